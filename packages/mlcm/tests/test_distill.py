import pytest
import torch
from mlcm import Condition, NoiseSchedule, TeacherTrajectory, TrajectoryBank, milestones
from mlcm.distill import (
    Pairs,
    consistency_loss,
    from_bank,
    milestone_pairs,
    predictions,
    segment_pairs,
    segment_times,
    student_sample,
)
from mlcm.losses import huber, l2, make_distance
from mlcm.mixture import GaussianMixture
from mlcm.randomness import RowNoise, seeded
from mlcm.schedule import CLEAN
from tenfold_shared.errors import UserError

MIXTURE = GaussianMixture.rings()
SCHEDULE = MIXTURE.schedule
TRAJECTORY = TeacherTrajectory(MIXTURE, SCHEDULE, guidance_scale=2.0)


def draws(rows: int, seed: int = 0) -> tuple[RowNoise, Condition, torch.Tensor]:
    generator = seeded(seed)
    condition = MIXTURE.condition(torch.randint(0, 4, (rows,), generator=generator))
    return RowNoise([generator], rows), condition, torch.randn(rows, 2, generator=generator)


def test_times_stay_inside_their_segment():
    t, n, end = segment_times(RowNoise([seeded(1)], 20_000), milestones(8), 20)
    tau = torch.tensor(milestones(8)[::-1])
    top = tau[torch.searchsorted(tau, end) + 1]
    assert ((t > end) & (t <= top)).all()
    assert ((n >= end) & (n < t) & ((n == t - 20) | (n == end))).all()
    assert set(end.tolist()) == set(milestones(8)[1:]) and int(t.min()) == 1 and int(t.max()) == 999


def test_a_neighbour_on_the_milestone_is_its_own_target():
    noise, condition, start = draws(2000)

    def wrong(z, t, c):
        return torch.full_like(z, 1e3)

    pairs = segment_pairs(wrong, TRAJECTORY, condition, noise, start=start, milestones=milestones(8), skip=200)
    # With a skip longer than a segment every neighbour lies on the milestone, so no student enters the targets.
    assert float(pairs.target.abs().max()) < 10
    torch.testing.assert_close(pairs.target, TRAJECTORY.solve(pairs.z, pairs.t, pairs.end, condition))


def test_stage_one_states_are_the_teachers_trajectory():
    noise, condition, start = draws(50)
    pairs = segment_pairs(MIXTURE.x0, TRAJECTORY, condition, noise, start=start, milestones=milestones(8), skip=20)
    assert torch.equal(pairs.z, TRAJECTORY.states(start, pairs.t, condition))


def test_one_segment_is_consistency_distillation_to_the_last_milestone():
    noise, condition, start = draws(300)
    pairs = segment_pairs(MIXTURE.x0, TRAJECTORY, condition, noise, start=start, milestones=milestones(1), skip=20)
    assert (pairs.end == 0).all()
    n = (pairs.t - 20).clamp_min(0)
    neighbour = TRAJECTORY.solve(pairs.z, pairs.t, n, condition)
    wanted = SCHEDULE.jump(neighbour, MIXTURE.x0(neighbour, n, condition), n, torch.zeros_like(n))
    torch.testing.assert_close(pairs.target, wanted)


def test_a_perfect_student_of_one_gaussian_has_no_loss():
    """Variance 1: x̂ = alpha z is the flow itself, so neighbours agree up to the solver's error."""

    def x0(z, t, condition, w=1.0):
        return SCHEDULE.alpha(t, z) * z

    def perfect(z, t, condition):
        # The flow of one unit Gaussian stands still: the x̂ whose jump to any s returns z solves alpha_s x + sigma_s e = z.
        return z * (1 - SCHEDULE.sigma(t, z)) / SCHEDULE.alpha(t, z)

    noise, _, start = draws(400)
    trajectory = TeacherTrajectory(x0, SCHEDULE, guidance_scale=1.0)
    pairs = milestone_pairs(
        perfect, trajectory, Condition(), noise, start=start, milestones=milestones(8), substeps=60, student_steps=2
    )
    inside = pairs.t > 124
    still = SCHEDULE.jump(pairs.z, perfect(pairs.z, pairs.t, Condition()), pairs.t, pairs.end)
    assert inside.any() and float(l2(still, pairs.target)[inside].mean()) < 0.3 * float(
        l2(pairs.z, torch.zeros_like(pairs.z)).mean()
    )


def test_stage_two_lands_on_the_next_milestone():
    noise, condition, start = draws(500)
    seen = []

    def watch(z, t, c):
        seen.append(t)
        return MIXTURE.x0(z, t, c)

    pairs = milestone_pairs(watch, TRAJECTORY, condition, noise, start=start, milestones=milestones(8))
    assert set(pairs.t.tolist()) == set(milestones(8)[:-1]) and (pairs.end == CLEAN).all()
    assert [int(t[0]) for t in seen[:4]] == [999, 749, 500, 250]
    place = {t: s for t, s in zip(milestones(8), milestones(8)[1:], strict=False)}
    assert seen[4].tolist() == [place[t] for t in pairs.t.tolist()]
    last = pairs.t == 124
    ends = TRAJECTORY.solve(
        pairs.z[last], pairs.t[last], torch.zeros_like(pairs.t[last]), condition.rows(last), steps=3
    )
    torch.testing.assert_close(pairs.target[last], ends)


def test_velocity_weights_make_the_loss_one_of_v():
    noise, condition, start = draws(300)
    make = dict(start=start, milestones=milestones(8))
    pairs = milestone_pairs(MIXTURE.x0, TRAJECTORY, condition, noise, **make)
    reached, sigma = predictions(MIXTURE.x0, SCHEDULE, pairs), SCHEDULE.sigma(pairs.t, pairs.z)
    v, wanted = ((SCHEDULE.alpha(pairs.t, pairs.z) * pairs.z - x) / sigma for x in (reached, pairs.target))
    torch.testing.assert_close(consistency_loss(MIXTURE.x0, SCHEDULE, pairs, l2), l2(v, wanted), rtol=1e-3, atol=1e-5)
    noise, condition, start = draws(300)
    uniform = milestone_pairs(MIXTURE.x0, TRAJECTORY, condition, noise, **make, weighting="uniform")
    assert torch.equal(uniform.target, pairs.target)
    assert torch.equal(consistency_loss(MIXTURE.x0, SCHEDULE, uniform, l2), l2(reached, pairs.target))


def test_predictions_carry_gradient_and_targets_none():
    noise, condition, start = draws(8)
    weight = torch.ones(1, requires_grad=True)

    def student(z, t, c):
        return weight * MIXTURE.x0(z, t, c)

    for make in (segment_pairs, milestone_pairs):
        more = {"skip": 20} if make is segment_pairs else {}
        pairs = make(student, TRAJECTORY, condition, noise, start=start, milestones=milestones(8), **more)
        assert not pairs.target.requires_grad and not pairs.z.requires_grad
        assert predictions(student, SCHEDULE, pairs).requires_grad
        (gradient,) = torch.autograd.grad(consistency_loss(student, SCHEDULE, pairs, l2).sum(), weight)
        assert gradient.isfinite().all()


def test_pairs_join():
    noise, condition, start = draws(6)
    make = dict(start=start, milestones=milestones(8))
    parts = [segment_pairs(MIXTURE.x0, TRAJECTORY, condition, noise, skip=20, **make),
             milestone_pairs(MIXTURE.x0, TRAJECTORY, condition, noise, **make)]  # fmt: skip
    both = Pairs.cat(parts)
    assert both.z.shape == (12, 2) and torch.equal(both.end[6:], parts[1].end)
    some = both.rows(torch.tensor([7, 2]))
    assert torch.equal(some.weight, both.weight[[7, 2]]) and torch.equal(some.target, both.target[[7, 2]])
    assert torch.equal(some.condition.given["class_labels"], condition.given["class_labels"][[1, 2]])
    joined = consistency_loss(MIXTURE.x0, SCHEDULE, both, l2)
    torch.testing.assert_close(joined, torch.cat([consistency_loss(MIXTURE.x0, SCHEDULE, p, l2) for p in parts]))


def test_states_from_a_bank_are_one_solver_step_away():
    noise, condition, start = draws(40)
    labels = condition.given["class_labels"]
    bank = TrajectoryBank.compute(TRAJECTORY, iter([(start, labels, condition)]), milestones(8))
    entries = torch.arange(40)
    pairs = segment_pairs(
        MIXTURE.x0, TRAJECTORY, condition, noise, start=from_bank(bank, entries), milestones=milestones(8), skip=20
    )
    near, at = bank.above(entries, pairs.t)
    torch.testing.assert_close(pairs.z, TRAJECTORY.solve(near, at, pairs.t, condition))


def test_student_sample_ends_at_the_prediction():
    noise, condition, start = draws(5)
    constant = torch.randn(5, 2)
    assert torch.equal(
        student_sample(lambda z, t, c: constant, SCHEDULE, condition, noise, start=start, steps=3), constant
    )


def test_rows_are_the_same_however_the_batch_is_cut():
    whole = RowNoise([seeded(3, 1)], 6)
    parts = [RowNoise([seeded(3, 1)], 6, keep=slice(3 * i, 3 * i + 3)) for i in range(2)]
    assert torch.equal(whole.normal(4), torch.cat([p.normal(4) for p in parts]))
    assert torch.equal(whole.integers(0, 99), torch.cat([p.integers(0, 99) for p in parts]))


def test_generators_depend_on_every_number():
    first = [torch.rand(1, generator=seeded(*key)).item() for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert len(set(first)) == 4 and first[0] == torch.rand(1, generator=seeded(0, 0, 0)).item()


def test_distances():
    a, b = torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [3.0, 0, 0]])
    assert l2(a, b).tolist() == [0, 3]
    torch.testing.assert_close(huber(a, b), torch.tensor([0.0, 3.0]), rtol=0, atol=2e-3)
    assert make_distance("l2") is l2 and make_distance("huber") is huber
    with pytest.raises(UserError, match="needs the feature network"):
        make_distance("latent_lpips")
    with pytest.raises(UserError, match="loss is 'l1'"):
        make_distance("l1")


def test_a_flow_is_distilled_by_the_same_code():
    schedule = NoiseSchedule.flow()
    trajectory = TeacherTrajectory(lambda z, t, c, w: 0.5 * z, schedule)
    noise, _, start = draws(64)
    pairs = segment_pairs(
        lambda z, t, c: 0.5 * z, trajectory, Condition(), noise, start=start, milestones=milestones(8), skip=20
    )
    assert consistency_loss(lambda z, t, c: 0.5 * z, schedule, pairs, l2).isfinite().all()
