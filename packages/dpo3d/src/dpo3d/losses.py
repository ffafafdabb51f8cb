"""Preference losses as pure functions of four log-probabilities, in one registry.

With Δ± = log π(a±|x) − log π0(a±|x) and z = β+ Δ+ − β− Δ−:

    DPO        −log σ(z), β+ = β− = β                        (2305.18290, eq. 7)
    Flex-DPO   −log σ(z), β+ ≠ β−                            (2406.07327, section 3.3)
    SFT-DPO    −log σ(z) − γ log π(a+|x)                     (2406.07327, eq. 7, with the sign its own gradient has)

Flex-DPO with β− = λ β+ is DPO-Shift's fixed strategy (2502.07599). Once β+ ≠ β− the partition function of DPO's
implicit reward no longer cancels, so β± Δ± are not rewards any more.
"""

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tenfold_shared.errors import UserError
from torch import Tensor

GammaReduction = Literal["sequence", "token"]


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a batch of pairs, each a `(batch,)` tensor of sums over the completion's tokens.

    The lengths count completion tokens; only the length-normalised losses need them.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_len: Tensor | None = None
    rejected_len: Tensor | None = None

    @property
    def delta_chosen(self) -> Tensor:
        """Δ+, in nats."""
        return self.chosen - self.ref_chosen

    @property
    def delta_rejected(self) -> Tensor:
        """Δ−, in nats."""
        return self.rejected - self.ref_rejected

    def margin(self, beta_chosen: float, beta_rejected: float) -> Tensor:
        """z = β+ Δ+ − β− Δ−."""
        return beta_chosen * self.delta_chosen - beta_rejected * self.delta_rejected

    def per_token(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability per token of both halves."""
        if self.chosen_len is None or self.rejected_len is None:
            raise UserError("this loss is normalised by length", hint="pass chosen_len and rejected_len")
        return self.chosen / self.chosen_len.clamp(min=1), self.rejected / self.rejected_len.clamp(min=1)

    def checked(self) -> "PairLogps":
        """The same in float32 or better. Raises UserError when shapes differ or a value is not finite."""
        given = {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}
        shapes = {name: tuple(value.shape) for name, value in given.items()}
        if len(set(shapes.values())) > 1 or self.chosen.dim() != 1:
            raise UserError(f"log-probabilities have shapes {shapes}, expected equal 1-D tensors")
        for name, value in given.items():
            if not bool(value.isfinite().all()):
                rows = (~value.isfinite()).nonzero().flatten().tolist()
                raise UserError(
                    f"{name} is not finite in rows {rows[:10]}", hint="empty completion or fp16 overflow; look at them"
                )
        return PairLogps(**{n: v if v.dtype == torch.float64 else v.float() for n, v in given.items()})


@dataclass(frozen=True)
class LossOutput:
    """What `preference_loss` gives; every field is `(batch,)`.

    The weights are what multiplies the parameter gradients of the two halves: −∂ℓ/∂log π+ and ∂ℓ/∂log π−. For the
    sigmoid family without γ they are β+ σ(−z) and β− σ(−z). They carry no gradient.
    """

    loss: Tensor
    z: Tensor
    weight_chosen: Tensor
    weight_rejected: Tensor


LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss of the registry: `function(logps, beta_chosen, beta_rejected, **options) -> (batch,)`."""

    function: LossFunction
    two_betas: bool

    @property
    def options(self) -> dict[str, Any]:
        """Its own keyword arguments with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


LOSSES: dict[str, RegisteredLoss] = {}


def register_loss(name: str, *, two_betas: bool = False) -> Callable[[LossFunction], LossFunction]:
    """Add a loss under `name`, for `preference_loss`, `FlexDPOConfig(loss_type=...)` and the toy.

    The function takes `(logps: PairLogps, beta_chosen: float, beta_rejected: float)`, options of its own as keyword-only
    arguments with defaults, and returns the loss of each pair, `(batch,)`. two_betas: it has a meaning for β+ ≠ β−.

    Raises UserError when the name is taken.
    """

    def add(function: LossFunction) -> LossFunction:
        if name in LOSSES:
            raise UserError(f"a loss named '{name}' is registered already", hint="choose another name")
        LOSSES[name] = RegisteredLoss(function, two_betas)
        return function

    return add


@register_loss("flex", two_betas=True)
@register_loss("sigmoid", two_betas=True)
def _sigmoid(logps: PairLogps, beta_chosen: float, beta_rejected: float) -> Tensor:
    return -F.logsigmoid(logps.margin(beta_chosen, beta_rejected))


@register_loss("hinge", two_betas=True)
def _hinge(logps: PairLogps, beta_chosen: float, beta_rejected: float) -> Tensor:
    return F.relu(1 - logps.margin(beta_chosen, beta_rejected))


@register_loss("robust", two_betas=True)
def _robust(logps: PairLogps, beta_chosen: float, beta_rejected: float, *, label_smoothing: float = 0.0) -> Tensor:
    """2403.00409: unbiased under labels flipped with probability ε."""
    z, e = logps.margin(beta_chosen, beta_rejected), label_smoothing
    return (e * F.logsigmoid(-z) - (1 - e) * F.logsigmoid(z)) / (1 - 2 * e)


@register_loss("dpop", two_betas=True)
def _dpop(logps: PairLogps, beta_chosen: float, beta_rejected: float, *, dpop_lambda: float = 5.0) -> Tensor:
    """2402.13228, eq. 3: the penalty for a chosen answer below its reference, inside the sigmoid."""
    penalty = beta_chosen * dpop_lambda * F.relu(-logps.delta_chosen)
    return -F.logsigmoid(logps.margin(beta_chosen, beta_rejected) - penalty)


@register_loss("nca_pair", two_betas=True)
def _nca_pair(logps: PairLogps, beta_chosen: float, beta_rejected: float) -> Tensor:
    chosen, rejected = beta_chosen * logps.delta_chosen, beta_rejected * logps.delta_rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@register_loss("bco_pair", two_betas=True)
def _bco_pair(logps: PairLogps, beta_chosen: float, beta_rejected: float) -> Tensor:
    return -F.logsigmoid(beta_chosen * logps.delta_chosen) - F.logsigmoid(-beta_rejected * logps.delta_rejected)


@register_loss("apo_zero", two_betas=True)
def _apo_zero(logps: PairLogps, beta_chosen: float, beta_rejected: float) -> Tensor:
    """2408.06266, eq. 7."""
    return torch.sigmoid(-beta_chosen * logps.delta_chosen) + torch.sigmoid(beta_rejected * logps.delta_rejected)


@register_loss("sppo_hard")
def _sppo_hard(logps: PairLogps, beta: float, _: float) -> Tensor:
    """2405.00675, eq. 4.7 with hard labels."""
    return (logps.delta_chosen - 0.5 / beta) ** 2 + (logps.delta_rejected + 0.5 / beta) ** 2


@register_loss("ipo_sum")
def _ipo_sum(logps: PairLogps, beta: float, _: float) -> Tensor:
    """IPO as printed (2310.12036, eq. 17), on sums over the tokens; β is its τ."""
    return (logps.delta_chosen - logps.delta_rejected - 0.5 / beta) ** 2


@register_loss("ipo")
def _ipo(logps: PairLogps, beta: float, _: float) -> Tensor:
    """IPO on means over the tokens, as TRL computes it."""
    chosen, rejected = logps.per_token()
    reference = dataclasses.replace(logps, chosen=logps.ref_chosen, rejected=logps.ref_rejected).per_token()
    return (chosen - reference[0] - rejected + reference[1] - 0.5 / beta) ** 2


@register_loss("cal_dpo")
def _cal_dpo(logps: PairLogps, beta: float, _: float) -> Tensor:
    """2412.14516, algorithm 1: no β inside the sigmoid, which is absorbed into the calibration targets."""
    chosen, rejected = logps.delta_chosen, logps.delta_rejected
    return -F.logsigmoid(chosen - rejected) + (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@register_loss("slic")
def _slic(logps: PairLogps, _: float, __: float, *, slic_delta: float = 5.0, slic_eta: float = 0.1) -> Tensor:
    """2305.10425, as 2406.07327 uses it: no reference, no β."""
    return F.relu(slic_delta - logps.chosen + logps.rejected) - slic_eta * logps.chosen


@register_loss("simpo")
def _simpo(logps: PairLogps, beta: float, _: float, *, simpo_margin: float = 0.5) -> Tensor:
    """2405.14734, eq. 6: no reference, means over the tokens."""
    chosen, rejected = logps.per_token()
    return -F.logsigmoid(beta * (chosen - rejected) - simpo_margin)


@register_loss("orpo")
def _orpo(logps: PairLogps, _: float, __: float, *, orpo_lambda: float = 1.0) -> Tensor:
    """2403.07691, eqs. 6 and 7: negative log-likelihood and the odds ratio of the mean token probabilities."""
    chosen, rejected = logps.per_token()
    return -chosen - orpo_lambda * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """log p − log(1 − p); p is kept one rounding below 1, where the odds are still finite."""
    below_one = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return below_one - torch.where(
        below_one > -math.log(2), torch.log(-torch.expm1(below_one)), torch.log1p(-torch.exp(below_one))
    )


@register_loss("sft")
def _sft(logps: PairLogps, _: float, __: float) -> Tensor:
    """Negative log-likelihood of the chosen answer, summed over its tokens."""
    return -logps.chosen


def check_betas(beta_chosen: float, beta_rejected: float) -> None:
    """Raises UserError when β+ <= 0 or β− < 0; warns when β− = 0 or β− > β+."""
    if not beta_chosen > 0:
        raise UserError(f"beta_chosen is {beta_chosen}, expected more than 0")
    if not beta_rejected >= 0:
        raise UserError(f"beta_rejected is {beta_rejected}, expected 0 or more")
    if beta_rejected == 0:
        warnings.warn("beta_rejected is 0: a chosen-only (SFT-like) objective", stacklevel=3)
    elif beta_rejected > beta_chosen:
        warnings.warn(
            f"beta_rejected {beta_rejected} is above beta_chosen {beta_chosen}: the rejected half gets the larger gradient",
            stacklevel=3,
        )


def find_loss(name: str) -> RegisteredLoss:
    """The loss of that name. Raises UserError naming all of them."""
    if name not in LOSSES:
        raise UserError(f"no loss named '{name}'", hint=f"there are {', '.join(sorted(LOSSES))}; or register_loss")
    return LOSSES[name]


def sft_term(
    chosen: Tensor, chosen_len: Tensor | None, gamma: float, gamma_reduction: GammaReduction = "sequence"
) -> Tensor:
    """−γ log π+ of each pair, `(batch,)`; `token` divides by the completion's length.

    For completions of one length T, γ per token does what γ / T per sequence does.
    Raises UserError when γ is negative, the reduction unknown, or a length missing.
    """
    if not gamma >= 0:
        raise UserError(f"gamma is {gamma}, expected 0 or more")
    if gamma_reduction not in ("sequence", "token"):
        raise UserError(f"gamma_reduction is '{gamma_reduction}', expected sequence or token")
    if gamma_reduction == "sequence":
        return -gamma * chosen
    if chosen_len is None:
        raise UserError("gamma_reduction 'token' is normalised by length", hint="pass chosen_len")
    return -gamma * chosen / chosen_len.clamp(min=1)


def preference_loss(
    name: str,
    logps: PairLogps,
    *,
    beta: float = 0.1,
    beta_chosen: float | None = None,
    beta_rejected: float | None = None,
    gamma: float = 0.0,
    gamma_reduction: GammaReduction = "sequence",
    **options: float,
) -> LossOutput:
    """The loss `name` of each pair, plus γ times the chosen answer's negative log-likelihood.

    logps: sums over completion tokens, `(batch,)` each; computed in float32, float64 stays.
    beta_chosen, beta_rejected: β+ and β−, `beta` where None. options: of that loss alone, such as `dpop_lambda`.

    Raises UserError for an unknown name or option, β+ <= 0, β− < 0, γ < 0, unequal shapes, values that are not finite;
    NotImplementedError for β+ ≠ β− with a loss that has one β only.
    """
    registered = find_loss(name)
    plus = beta if beta_chosen is None else beta_chosen
    minus = beta if beta_rejected is None else beta_rejected
    check_betas(plus, minus)
    if plus != minus and not registered.two_betas:
        raise NotImplementedError(f"loss '{name}' has one beta, given beta_chosen {plus} and beta_rejected {minus}")
    if unknown := sorted(set(options) - set(registered.options)):
        accepted = ", ".join(registered.options) or "none"
        raise UserError(f"loss '{name}' has no option {', '.join(unknown)}", hint=f"its options: {accepted}")
    logps = logps.checked()

    def per_pair(values: PairLogps) -> Tensor:
        loss = registered.function(values, plus, minus, **options)
        return loss + sft_term(values.chosen, values.chosen_len, gamma, gamma_reduction) if gamma else loss

    with torch.enable_grad():
        leaves = [logps.chosen.detach().requires_grad_(), logps.rejected.detach().requires_grad_()]
        local = per_pair(dataclasses.replace(logps, chosen=leaves[0], rejected=leaves[1]))
        plus_grad, minus_grad = torch.autograd.grad(local.sum(), leaves, allow_unused=True, materialize_grads=True)
    return LossOutput(per_pair(logps), logps.margin(plus, minus).detach(), -plus_grad, minus_grad)
