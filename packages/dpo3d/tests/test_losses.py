import math

import pytest
import torch
import torch.nn.functional as F
from dpo3d.losses import LOSSES, PairLogps, preference_loss, register_loss, sft_term
from tenfold_shared.errors import UserError

B = 8


def pairs(seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 5.0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    draws = [-scale * torch.rand(B, generator=generator, dtype=torch.float64) - 0.1 for _ in range(4)]
    lengths = torch.arange(2.0, 2 + B, dtype=torch.float64), torch.arange(4.0, 4 + B, dtype=torch.float64)
    return PairLogps(*(d.to(dtype) for d in (*draws, *lengths)))


def test_equal_betas_are_dpo() -> None:
    logps = pairs()
    z = 0.3 * (logps.delta_chosen - logps.delta_rejected)
    out = preference_loss("flex", logps, beta_chosen=0.3, beta_rejected=0.3)
    torch.testing.assert_close(out.loss, -torch.log(torch.sigmoid(z)))
    torch.testing.assert_close(out.loss, preference_loss("sigmoid", logps, beta=0.3).loss)


def test_betas_are_not_swapped() -> None:
    logps = pairs()
    out = preference_loss("flex", logps, beta_chosen=0.2, beta_rejected=0.05)
    torch.testing.assert_close(out.z, 0.2 * logps.delta_chosen - 0.05 * logps.delta_rejected)
    torch.testing.assert_close(out.weight_chosen, 0.2 * torch.sigmoid(-out.z))
    torch.testing.assert_close(out.weight_rejected, 0.05 * torch.sigmoid(-out.z))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_weights_are_the_gradients(name: str) -> None:
    logps = pairs(1)
    chosen, rejected = logps.chosen.clone().requires_grad_(), logps.rejected.clone().requires_grad_()
    live = PairLogps(chosen, rejected, logps.ref_chosen, logps.ref_rejected, logps.chosen_len, logps.rejected_len)
    out = preference_loss(name, live, gamma=0.03)
    out.loss.sum().backward()
    zero = torch.zeros(B, dtype=torch.float64)
    torch.testing.assert_close(out.weight_chosen, -chosen.grad)
    torch.testing.assert_close(out.weight_rejected, zero if rejected.grad is None else rejected.grad)
    assert not out.weight_chosen.requires_grad


def test_each_formula_once() -> None:
    logps, b = pairs(2), 0.25
    plus, minus = logps.delta_chosen, logps.delta_rejected
    mean_plus, mean_minus = logps.chosen / logps.chosen_len, logps.rejected / logps.rejected_len
    ref_plus, ref_minus = logps.ref_chosen / logps.chosen_len, logps.ref_rejected / logps.rejected_len
    odds = [p.exp() / (1 - p.exp()) for p in (mean_plus, mean_minus)]
    expected = {
        "hinge": (1 - b * (plus - minus)).clamp(min=0),
        "robust": -F.logsigmoid(b * (plus - minus)),
        "dpop": -F.logsigmoid(b * (plus - minus - 5.0 * (-plus).clamp(min=0))),
        "nca_pair": -F.logsigmoid(b * plus) - 0.5 * F.logsigmoid(-b * plus) - 0.5 * F.logsigmoid(-b * minus),
        "bco_pair": -F.logsigmoid(b * plus) - F.logsigmoid(-b * minus),
        "apo_zero": 1 - torch.sigmoid(b * plus) + torch.sigmoid(b * minus),
        "sppo_hard": (plus - 0.5 / b) ** 2 + (minus + 0.5 / b) ** 2,
        "ipo_sum": (plus - minus - 0.5 / b) ** 2,
        "ipo": (mean_plus - ref_plus - mean_minus + ref_minus - 0.5 / b) ** 2,
        "cal_dpo": -F.logsigmoid(plus - minus) + (plus - 0.5 / b) ** 2 + (minus + 0.5 / b) ** 2,
        "slic": (5.0 - logps.chosen + logps.rejected).clamp(min=0) - 0.1 * logps.chosen,
        "simpo": -F.logsigmoid(b * (mean_plus - mean_minus) - 0.5),
        "orpo": -mean_plus - F.logsigmoid((odds[0] / odds[1]).log()),
        "sft": -logps.chosen,
    }
    for name, loss in expected.items():
        torch.testing.assert_close(preference_loss(name, logps, beta=b).loss, loss, msg=name)


def test_dpop_lambda_is_inside_the_sigmoid() -> None:
    logps = PairLogps(*(torch.tensor([v]) for v in (-3.0, -2.0, -1.0, -2.0)))
    inside = preference_loss("dpop", logps, beta=0.1, dpop_lambda=2.0).loss
    assert inside.item() == pytest.approx(-math.log(1 / (1 + math.exp(0.1 * (2 + 4)))))


def test_gamma_adds_the_likelihood_and_converts_by_length() -> None:
    logps = pairs(3)
    plain = preference_loss("sigmoid", logps).loss
    torch.testing.assert_close(preference_loss("sigmoid", logps, gamma=0.2).loss, plain - 0.2 * logps.chosen)
    by_token = preference_loss("sigmoid", logps, gamma=0.2, gamma_reduction="token").loss
    torch.testing.assert_close(by_token, plain - 0.2 * logps.chosen / logps.chosen_len)
    length = torch.full((B,), 7.0, dtype=torch.float64)
    torch.testing.assert_close(
        sft_term(logps.chosen, length, 0.7, "token"), sft_term(logps.chosen, length, 0.1, "sequence")
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_finite_far_out(name: str) -> None:
    far = PairLogps(*(torch.tensor([v, -1e4]) for v in (-1e4, -1e4, -1.0, -2.0)), *(torch.tensor([9.0, 9.0]),) * 2)
    out = preference_loss(name, far)
    assert out.loss.isfinite().all() and out.weight_chosen.isfinite().all() and out.weight_rejected.isfinite().all()


def test_half_precision_is_computed_in_float32() -> None:
    out = preference_loss("sigmoid", pairs(dtype=torch.bfloat16))
    assert out.loss.dtype == torch.float32
    assert preference_loss("sigmoid", pairs()).loss.dtype == torch.float64


def test_orpo_is_finite_at_probability_one() -> None:
    one = torch.zeros(1)
    assert preference_loss("orpo", PairLogps(one, one - 1, one, one, one + 1, one + 1)).loss.isfinite().all()


def test_register_loss() -> None:
    @register_loss("test_margin", two_betas=True)
    def margin(logps: PairLogps, beta_chosen: float, beta_rejected: float, *, shift: float = 0.0) -> torch.Tensor:
        return shift - logps.margin(beta_chosen, beta_rejected)

    try:
        out = preference_loss("test_margin", pairs(), beta_chosen=0.2, beta_rejected=0.1, shift=1.0)
        torch.testing.assert_close(out.loss, 1 - out.z)
        torch.testing.assert_close(out.weight_chosen, torch.full((B,), 0.2, dtype=torch.float64))
        with pytest.raises(UserError, match="registered already"):
            register_loss("test_margin")(margin)
    finally:
        del LOSSES["test_margin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_chosen": 0.0}, "beta_chosen is 0.0, expected more than 0"),
        ({"beta_chosen": math.nan}, "beta_chosen is nan"),
        ({"beta_rejected": -0.1}, "beta_rejected is -0.1, expected 0 or more"),
        ({"gamma": -1.0}, "gamma is -1.0"),
        ({"gamma": 0.1, "gamma_reduction": "words"}, "expected sequence or token"),
        ({"dpop_lambda": 1.0}, "no option dpop_lambda"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preference_loss("sigmoid", pairs(), **arguments)


def test_bad_logps() -> None:
    good = pairs()
    with pytest.raises(UserError, match=r"no loss named 'dpoo'.*sigmoid"):
        preference_loss("dpoo", good)
    with pytest.raises(UserError, match=r"shapes .*expected equal 1-D"):
        preference_loss("sigmoid", PairLogps(good.chosen[:3], good.rejected, good.ref_chosen, good.ref_rejected))
    broken = good.chosen.clone()
    broken[[2, 5]] = -math.inf
    with pytest.raises(UserError, match=r"chosen is not finite in rows \[2, 5\].*empty completion or fp16 overflow"):
        preference_loss("sigmoid", PairLogps(broken, good.rejected, good.ref_chosen, good.ref_rejected))
    bare = PairLogps(good.chosen, good.rejected, good.ref_chosen, good.ref_rejected)
    with pytest.raises(UserError, match="normalised by length"):
        preference_loss("ipo", bare)
    with pytest.raises(UserError, match="pass chosen_len"):
        preference_loss("sigmoid", bare, gamma=0.1, gamma_reduction="token")
    with pytest.raises(NotImplementedError, match="'ipo' has one beta"):
        preference_loss("ipo", good, beta_rejected=0.02)


def test_warnings_on_odd_betas() -> None:
    with pytest.warns(UserWarning, match="chosen-only"):
        preference_loss("flex", pairs(), beta_rejected=0.0)
    with pytest.warns(UserWarning, match="above beta_chosen"):
        preference_loss("flex", pairs(), beta_rejected=0.2)
