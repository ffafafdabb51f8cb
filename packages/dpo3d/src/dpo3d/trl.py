"""Separate betas and the other remedies on TRL's own `DPOTrainer`.

`FlexDPOTrainer` lets TRL run its whole `_compute_loss` (one policy forward, the auxiliary loss of mixtures of experts,
every metric), records the per-token log-probabilities of that forward, and adds the losses of `dpo3d.losses` to it. With
no field of dpo3d set it is TRL's trainer unchanged. Contract-tested against TRL 1.16.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tenfold_shared.errors import UserError
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from dpo3d.losses import LOSSES, GammaReduction, PairLogps, check_betas, find_loss, preference_loss, sft_term

TRL_LOSSES = frozenset(
    {"sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"}
    | {"aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"}
)
"""The names TRL 1.16 computes itself; a contract test compares them with the installed TRL."""


@dataclass
class FlexDPOConfig(DPOConfig):
    """TRL's `DPOConfig` with the remedies of dpo3d.

    Unlike TRL, `loss_type` is checked here and not at the first step; it takes TRL's names and every registered loss.

    Raises UserError for an unknown loss, β+ <= 0, β− < 0, both `dpo_lambda` and `beta_rejected`, an unknown schedule or
    reduction, a negative γ; NotImplementedError for two betas with a loss that has one, and for `f_divergence_type` or
    `use_weighting` together with a field of dpo3d.
    """

    beta_chosen: float | None = field(default=None, metadata={"help": "β+ of the chosen half; `beta` when not given."})
    beta_rejected: float | None = field(
        default=None, metadata={"help": "β− of the rejected half; `beta` when not given. Try 0.02 with beta 0.1."}
    )
    dpo_lambda: float | None = field(
        default=None, metadata={"help": "β−/β+, DPO-Shift's name for it; instead of `beta_rejected`."}
    )
    beta_rejected_final: float | None = field(default=None, metadata={"help": "β− at the last step of the schedule."})
    beta_rejected_schedule: str = field(
        default="constant",
        metadata={"help": "How β− moves to its final value.", "choices": ["constant", "linear", "cosine"]},
    )
    sft_gamma: float = field(
        default=0.0, metadata={"help": "γ: adds γ times the chosen answer's negative log-likelihood. Try 0.05."}
    )
    sft_reduction: str = field(
        default="sequence",
        metadata={"help": "γ per sequence (summed over tokens) or per token.", "choices": ["sequence", "token"]},
    )
    dpop_lambda: float = field(default=5.0, metadata={"help": "λ of loss `dpop`."})
    slic_delta: float = field(default=5.0, metadata={"help": "Margin δ of loss `slic`, in nats."})
    slic_eta: float = field(default=0.1, metadata={"help": "Weight η of the likelihood in loss `slic`."})
    simpo_margin: float = field(default=0.5, metadata={"help": "Margin of loss `simpo`."})
    orpo_lambda: float = field(default=1.0, metadata={"help": "λ of loss `orpo`."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.loss_type:
            if name not in TRL_LOSSES:
                find_loss(name)
        if self.dpo_lambda is not None and self.beta_rejected is not None:
            raise UserError(
                "both dpo_lambda and beta_rejected are given", hint="beta_rejected = dpo_lambda * beta_chosen"
            )
        if self.beta_rejected_schedule not in ("constant", "linear", "cosine"):
            raise UserError(
                f"beta_rejected_schedule is '{self.beta_rejected_schedule}', expected constant, linear or cosine"
            )
        if (self.beta_rejected_schedule == "constant") != (self.beta_rejected_final is None):
            raise UserError("beta_rejected_final and a beta_rejected_schedule of linear or cosine go together")
        check_betas(*self.betas)
        if self.beta_rejected_final is not None:
            check_betas(self.betas[0], self.beta_rejected_final)
        # Its own checks of γ and the reduction, before any training.
        sft_term(torch.zeros(1), torch.ones(1), self.sft_gamma, self.gamma_reduction)
        if self.two_betas:
            for name in self.loss_type:
                if name != "sft" and (name not in LOSSES or not LOSSES[name].two_betas):
                    raise NotImplementedError(
                        f"loss_type '{name}' has one beta; beta_chosen and beta_rejected do not apply"
                    )
        if self.extends_trl and self.f_divergence_type != "reverse_kl":
            raise NotImplementedError(f"f_divergence_type '{self.f_divergence_type}' with the losses of dpo3d")
        if self.extends_trl and self.use_weighting:
            raise NotImplementedError("use_weighting with the losses of dpo3d")

    @property
    def betas(self) -> tuple[float, float]:
        """β+ and the starting β−."""
        chosen = self.beta if self.beta_chosen is None else self.beta_chosen
        if self.dpo_lambda is not None:
            return chosen, self.dpo_lambda * chosen
        return chosen, self.beta if self.beta_rejected is None else self.beta_rejected

    @property
    def two_betas(self) -> bool:
        """Whether a field about separate betas is set."""
        fields = (self.beta_chosen, self.beta_rejected, self.dpo_lambda, self.beta_rejected_final)
        return any(value is not None for value in fields)

    @property
    def extends_trl(self) -> bool:
        """Whether anything is asked for that TRL does not do itself."""
        return self.two_betas or self.sft_gamma > 0 or not TRL_LOSSES.issuperset(self.loss_type)

    @property
    def gamma_reduction(self) -> GammaReduction:
        """`sft_reduction`, by the name it has in `preference_loss`."""
        return self.sft_reduction  # type: ignore[return-value]

    def beta_rejected_at(self, progress: float) -> float:
        """β− at a share of the training in [0, 1]."""
        start = self.betas[1]
        if self.beta_rejected_final is None:
            return start
        share = progress if self.beta_rejected_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return start + share * (self.beta_rejected_final - start)


class _Recorder:
    """Calls the model and keeps the per-token log-probabilities of the fused forward."""

    def __init__(self, model: Any):
        self.model = model
        self.log_probs: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        if inputs.get("fused_lm_head"):
            self.log_probs = outputs.log_probs
        return outputs


class FlexDPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with the losses of dpo3d; takes a `FlexDPOConfig`.

    Besides TRL's metrics (rewards with each half's own β) it logs `dpo3d/weight_chosen`, `dpo3d/weight_rejected`,
    `dpo3d/log_grad_ratio` and `dpo3d/chosen_share` = mean Δ+ / (mean Δ+ − mean Δ−).

    Raises UserError when `args` is not a FlexDPOConfig, or no reference can be had for a model that is only in memory.
    """

    _name = "Flex-DPO"
    loss_types: list[str]
    loss_weights: list[float]
    precompute_ref_logps: bool

    def __init__(self, model: Any, ref_model: Any = None, args: FlexDPOConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            args = FlexDPOConfig()
        if not isinstance(args, FlexDPOConfig):
            raise UserError(f"args is a {type(args).__name__}, expected a FlexDPOConfig")
        in_memory = not isinstance(model, str) and not getattr(model.config, "_name_or_path", "")
        peft = kwargs.get("peft_config") is not None or hasattr(model, "peft_config")
        if in_memory and ref_model is None and not peft and not args.precompute_ref_log_probs:
            raise UserError(
                "the model is only in memory and there is no ref_model",
                hint="pass ref_model, a peft_config, or precompute_ref_log_probs=True",
            )
        super().__init__(model, ref_model, args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if not self.args.extends_trl:
            return super()._compute_loss(model, inputs, return_outputs)
        if not self.precompute_ref_logps:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = {**inputs, "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
        recorder = _Recorder(model)
        own = [name in LOSSES and name != "sft" for name in self.loss_types]
        with self._trl_computes([not mine for mine in own]):
            result = super()._compute_loss(recorder, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        names = [(n, w) for n, w, mine in zip(self.loss_types, self.loss_weights, own, strict=True) if mine]
        loss = loss + self._own_losses(recorder.log_probs, inputs, names)
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _trl_computes(self, keep: list[bool]) -> Iterator[None]:
        """TRL sees only the kept losses, and the reference as columns of the batch."""
        names, weights, precomputed = self.loss_types, self.loss_weights, self.precompute_ref_logps
        self.loss_types = [name for name, kept in zip(names, keep, strict=True) if kept]
        self.loss_weights = [weight for weight, kept in zip(weights, keep, strict=True) if kept]
        self.precompute_ref_logps = True
        try:
            yield
        finally:
            self.loss_types, self.loss_weights, self.precompute_ref_logps = names, weights, precomputed

    def _own_losses(self, log_probs: Any, inputs: dict[str, Any], names: list[tuple[str, float]]) -> Tensor:
        mask = inputs["completion_mask"][:, 1:]
        # Prompt-learning adapters put virtual tokens before the real ones.
        logps = self._sequence_logps(log_probs[:, -mask.size(1) :], mask)
        chosen, rejected = logps.chunk(2)
        lengths = mask.sum(1).to(logps.dtype).chunk(2)
        pair = PairLogps(chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], *lengths)
        progress = min(self.state.global_step / self.state.max_steps, 1.0) if self.state.max_steps > 0 else 0.0
        betas = self.args.betas[0], self.args.beta_rejected_at(progress)
        loss = sft_term(pair.chosen, pair.chosen_len, self.args.sft_gamma, self.args.gamma_reduction).mean()
        weights = torch.zeros(2, len(chosen), device=logps.device)
        # −∂/∂log π+ of a term that is linear in log π+ is its value at −1.
        weights[0] += sft_term(
            -torch.ones_like(weights[0]), pair.chosen_len, self.args.sft_gamma, self.args.gamma_reduction
        )
        for name, weight in names:
            options = {o: getattr(self.args, o) for o in LOSSES[name].options if hasattr(self.args, o)}
            out = preference_loss(name, pair, beta_chosen=betas[0], beta_rejected=betas[1], **options)
            loss = loss + weight * out.loss.mean()
            weights += weight * torch.stack([out.weight_chosen, out.weight_rejected])
        self._log_pairs(pair, betas, weights)
        return loss

    def _sequence_logps(self, per_token: Tensor, mask: Tensor) -> Tensor:
        """Sums over completion tokens; with `ld_alpha` those beyond the shorter half's length count α (LD-DPO)."""
        if self.ld_alpha is None:
            return per_token.sum(1)
        shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2).unsqueeze(1)
        tail = (mask.cumsum(1) > shared) & mask.bool()
        return (per_token * torch.where(tail, self.ld_alpha, 1.0)).sum(1)

    def _log_pairs(self, pair: PairLogps, betas: tuple[float, float], weights: Tensor) -> None:
        """Rewards with each half's own β in place of TRL's, and the quantities of dpo3d."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        local = torch.stack(
            [pair.delta_chosen, pair.delta_rejected, *weights, pair.chosen - pair.rejected], dim=1
        ).detach()
        plus, minus, weight_plus, weight_minus, gap = self.accelerator.gather(local.float()).T
        rewards, tiny = (betas[0] * plus, betas[1] * minus), torch.finfo(torch.float32).tiny
        metrics["rewards/chosen"][-1] = rewards[0].mean().item()
        metrics["rewards/rejected"][-1] = rewards[1].mean().item()
        metrics["rewards/margins"][-1] = (rewards[0] - rewards[1]).mean().item()
        metrics["rewards/accuracies"][-1] = (rewards[0] > rewards[1]).float().mean().item()
        moved = (plus.mean() - minus.mean()).item()
        log_ratio = weight_minus.abs().clamp(min=tiny).log() - weight_plus.abs().clamp(min=tiny).log() + gap
        metrics["dpo3d/weight_chosen"].append(weight_plus.mean().item())
        metrics["dpo3d/weight_rejected"].append(weight_minus.mean().item())
        metrics["dpo3d/log_grad_ratio"].append(log_ratio.mean().item())
        metrics["dpo3d/chosen_share"].append(plus.mean().item() / moved if moved else 0.0)
