"""The search on the exact world, through the real pipeline: its trace, its count of calls, its options."""

import pytest
import torch
from lcmis_align import (
    CallableScorer,
    Concept,
    ConceptPlan,
    MoCE,
    PlanError,
    Rules,
    ScorerError,
    UnsupportedPipelineError,
)
from lcmis_align.worlds import exact
from tenfold_shared.errors import UserError

PLAN = exact.plan("square")


@pytest.fixture(scope="module")
def pipe():
    return exact.load()


def moce(pipe, **options):
    return MoCE(pipe, CallableScorer(exact.exact_scores), **{"batch_size": 50, **options})


def run(made, n=50, **more):
    return made(PLAN, num_images=n, num_inference_steps=40, guidance_scale=1.0, **more)


def test_a_search_repairs_the_prompt(pipe):
    plain = exact.exact_scores(
        moce(pipe).draw(PLAN, switch_step=0, seeds=range(50), guidance_scale=1.0), ["square", "checker"]
    )
    found = run(moce(pipe))
    assert plain.min(dim=1).values.mean() <= 0.1 < 0.15 <= found.scores["joint"]
    assert len(found.images) == 50 == len(found.switch_steps)
    assert found.scores["sA"] == exact.exact_scores(found.images, ["square"]).mean()
    assert 0 <= found.scores["latent"] <= 1
    assert str(found.schedule) == f"[square:checker square:{found.switch_step}]"


@pytest.mark.parametrize("options", [
    {}, {"policy": "paper"}, {"search": "golden"}, {"search": "sweep"}, {"search": "successive_halving"},
    {"stage2": "second"}, {"stage2": "auto"}, {"normalise": "rank", "references": 4}, {"search": "sweep", "stage2": "auto"},
])  # fmt: skip
def test_calls_are_counted_and_estimated(pipe, options):
    made, n = moce(pipe, batch_size=3, **options), 7  # the last batch is smaller
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        found = run(made, n)
    finally:
        handle.remove()
    assert sum(rows) == found.calls
    least, most = made.estimate(n, 40)
    assert least <= found.calls <= most
    if options.get("search") == "sweep":
        assert least == most
    references = 2 * 4 * 40 if options.get("normalise") else 0
    assert sum(row["calls"] for row in found.trace) + references == found.calls


def test_the_trace_is_the_formula(pipe):
    found = run(moce(pipe, policy="paper"), 16)
    ks = list(dict.fromkeys(row["k"] for row in found.trace))
    assert found.calls == 16 * (max(ks) + sum(40 - k for k in ks))
    assert all(row["calls"] == 0 for i, row in enumerate(found.trace) if row["k"] in [r["k"] for r in found.trace[:i]])
    row = found.trace[0]
    assert list(row) == ["stage2", "k", "sA", "sB", "D", "joint", "latent", "images", "calls", "seconds"]
    assert row["D"] == row["sA"] - row["sB"]


def test_the_second_concept_alone_settles_this_world(pipe):
    assert run(moce(pipe, stage2="auto"), 40).stage2 == "second"
    assert run(moce(pipe, stage2="second"), 40).scores["joint"] >= 0.9


def test_a_search_depends_on_nothing_before_it(pipe):
    made = moce(pipe, policy="paper")
    first = run(made, 12)
    run(made, 5)
    again = run(made, 12)
    assert [row["k"] for row in first.trace] == [row["k"] for row in again.trace]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first.images, again.images, strict=True))


def test_a_step_of_its_own_for_every_image(pipe):
    shared, each = run(moce(pipe, search="sweep"), 40), run(moce(pipe, search="sweep", per_image=True), 40)
    assert each.calls == shared.calls
    assert each.scores["joint"] > shared.scores["joint"]
    assert len(set(each.switch_steps)) > 1
    i = next(i for i, k in enumerate(each.switch_steps) if k != each.switch_step)
    alone = moce(pipe).draw(PLAN, switch_step=each.switch_steps[i], seeds=[each.seeds[i]], guidance_scale=1.0)
    assert alone[0].tobytes() == each.images[i].tobytes()


def test_halving_draws_all_images_of_the_step_it_chooses(pipe):
    assert len(run(moce(pipe, search="successive_halving"), 13).images) == 13


def test_draw_at_both_ends(pipe):
    made = moce(pipe)
    plain = pipe(
        "checker square", num_inference_steps=40, guidance_scale=1.0, generator=[torch.Generator().manual_seed(5)]
    )
    first = pipe("square", num_inference_steps=40, guidance_scale=1.0, generator=[torch.Generator().manual_seed(5)])
    assert made.draw(PLAN, switch_step=0, seeds=[5], guidance_scale=1.0)[0].tobytes() == plain.images[0].tobytes()
    assert made.draw(PLAN, switch_step=40, seeds=[5], guidance_scale=1.0)[0].tobytes() == first.images[0].tobytes()


def test_a_prompt_is_planned(pipe):
    found = moce(pipe)("a square of checker", num_images=2, guidance_scale=1.0)
    assert (found.plan.first.name, found.plan.second.name) == ("a square", "checker")


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_every_family_searches(pipelines, family):
    model, arguments = pipelines(family)
    plan = ConceptPlan(Concept("a tea cup"), Concept("iced coke"), "a tea cup of iced coke", latent="glass")
    scorer = CallableScorer(lambda images, texts: [[len(text) / 20 for text in texts]] * len(images))
    found = MoCE(model, scorer, search="golden", rules=Rules(max_probes=3))(
        plan, num_images=2, num_inference_steps=8, **arguments
    )
    assert len(found.images) == 2
    assert found.images[0].size == (32, 32)


def test_a_second_stage_pipeline_searches(pipelines, refiner):
    model, arguments = pipelines("sdxl")
    plan = ConceptPlan(Concept("a tea cup"), Concept("iced coke"), "a tea cup of iced coke")
    made = MoCE(
        model, CallableScorer(lambda images, texts: [[0.8] * len(texts)] * len(images)), stage2_pipeline=refiner
    )
    found = made(plan, num_images=2, num_inference_steps=10, **arguments)
    alone = MoCE(model, made.scorer).draw(
        plan, switch_step=found.switch_step, seeds=[0, 1], num_inference_steps=10, **arguments
    )
    assert found.images[0].tobytes() != alone[0].tobytes()


def test_errors(pipe):
    with pytest.raises(ValueError, match=r"switch_step 45 is outside 0\.\.40"):
        moce(pipe).draw(PLAN, switch_step=45, guidance_scale=1.0)
    for name, value in {"search": "x", "policy": "x", "stage2": "x", "normalise": "x"}.items():
        with pytest.raises(UserError, match=f"{name} is 'x'"):
            moce(pipe, **{name: value})
    with pytest.raises(UserError, match="batch_size is 0"):
        moce(pipe, batch_size=0)
    with pytest.raises(UserError, match="num_images is 0"):
        run(moce(pipe), 0)
    with pytest.raises(UserError, match="num_images is 3 but 2 seeds"):
        moce(pipe)(PLAN, num_images=3, seeds=[0, 1])
    with pytest.raises(PlanError, match="could not split 'red' into two concepts; pass first"):
        moce(pipe)("red")
    with pytest.raises(UnsupportedPipelineError, match="object takes no prompt"):
        MoCE(object(), CallableScorer(exact.exact_scores))
    with pytest.raises(ScorerError, match=r"scorer returned shape \(3, 2\), expected \(4, 3\)"):
        MoCE(pipe, CallableScorer(lambda images, texts: torch.zeros(3, 2)))(PLAN, num_images=4, guidance_scale=1.0)
    with pytest.raises(ScorerError, match="nan for image 0 and text 'square'"):
        MoCE(pipe, CallableScorer(lambda images, texts: torch.full((len(images), len(texts)), torch.nan)))(
            PLAN, num_images=1, guidance_scale=1.0
        )
