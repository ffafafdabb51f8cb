"""The settings of null experts, and the selection size that keeps a model's function.

Every null row starts as a copy of a true row and loses every tie against it. With r = m / n copies of each, the top-K of
the n + m logits is, in order, each true expert followed by its r copies. The k0 best true experts, and no others, are
among the first K exactly when

    (k0 - 1)(r + 1) + 1 <= K <= k0 (r + 1).                                       (derived from 2406.13233, section 3)

The smallest such K has the lowest balanced load, K n / (n + m).
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from adamoe.errors import ConfigError

NullInit = Literal["copy", "copy_noise", "zeros", "bias"]
NullType = Literal["zero", "identity"]
Normalization = Literal["auto", "selected_true", "all_true", "selected_all", "none"]
WeightGradient = Literal["true_only", "straight_through"]
Balance = Literal["null_average", "individual"]
Reduction = Literal["per_layer", "pooled"]
Anneal = Literal["step", "linear", "cosine"]
Experts = Literal[
    "auto", "adamoe", "adamoe_grouped", "adamoe_loop", "adamoe_static", "eager", "grouped_mm", "batched_mm"
]
CHOICES: dict[str, Any] = {
    "null_init": NullInit,
    "null_type": NullType,
    "weight_normalization": Normalization,
    "weight_gradient": WeightGradient,
    "balance": Balance,
    "aux_reduction": Reduction,
    "anneal": Anneal,
    "experts_implementation": Experts,
}


FUNCTION = ("num_null_experts", "top_k", "null_type", "weight_normalization")
"""The settings that decide what a model computes."""
TRAINING = ("weight_gradient", "balance", "aux_reduction", "aux_coef", "anneal", "anneal_at", "target_load")
"""Those that decide how it is trained."""


def preserving_top_k(num_experts: int, num_null_experts: int, original_top_k: int) -> range | None:
    """The selection sizes K that keep the function of a model converted with copied null rows.

    num_experts: true experts n. num_null_experts: m. original_top_k: k0.
    None when m is not a multiple of n, where some experts would have one copy more than others.
    """
    if num_null_experts % num_experts:
        return None
    copies = num_null_experts // num_experts
    return range((original_top_k - 1) * (copies + 1) + 1, original_top_k * (copies + 1) + 1)


@dataclass(frozen=True)
class AdaMoEConfig:
    """Settings of a conversion; all are checked when the object is made (ConfigError).

    The defaults are the paper's: zero nulls, eq. 6 with the nulls averaged, weights over the true experts, and a
    coefficient of 0.02 in the first half of training and 1e-4 in the second.
    """

    num_null_experts: int = 8
    """Null experts m >= 0; 0 leaves the stock router as it is."""
    top_k: int | Literal["preserve"] = "preserve"
    """Selection size K over true and null experts; "preserve" takes the smallest that keeps the function."""
    null_init: NullInit = "copy"
    """"copy" tiles the router's rows; "copy_noise" adds 1 % of their spread; "zeros"; "bias": zeros, chosen by bias only."""
    null_type: NullType = "zero"
    """"zero" experts give nothing; "identity" experts give the token itself, weighted over all selected."""
    weight_normalization: Normalization = "auto"
    """What the weights of the chosen true experts add up over; "auto" follows the family."""
    weight_gradient: WeightGradient = "true_only"
    """"straight_through" (experimental): the same values, the gradient of weights over all selected."""
    balance: Balance = "null_average"
    """"null_average" is eq. 6; "individual" counts the nulls one by one, as the published Mixtral code does."""
    aux_reduction: Reduction = "per_layer"
    """"pooled" adds f and P over the layers first, as transformers does."""
    aux_coef: tuple[float, float] = (0.02, 1e-4)
    """Coefficient of the loss before and after annealing."""
    anneal: Anneal = "step"
    """How the coefficient goes from the first to the second value."""
    anneal_at: float = 0.5
    """Share of training at which "step" switches, and "linear" and "cosine" begin."""
    target_load: float | None = None
    """True experts per token that the load controller steers to."""
    experts_implementation: Experts = "auto"
    """Kernel of the expert layers; "auto" does work in proportion to the load."""

    def __post_init__(self) -> None:
        if not _whole(self.num_null_experts) or self.num_null_experts < 0:
            raise ConfigError(f"num_null_experts is {self.num_null_experts}, expected a whole number of 0 or more")
        if self.top_k != "preserve" and (not _whole(self.top_k) or self.top_k < 1):
            raise ConfigError(f"top_k is {self.top_k!r}, expected 'preserve' or a whole number of 1 or more")
        for name, kind in CHOICES.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(get_args(kind))}")
        object.__setattr__(self, "aux_coef", check_aux_coef(self.aux_coef))
        if not _number(self.anneal_at) or self.anneal_at > 1:
            raise ConfigError(f"anneal_at is {self.anneal_at!r}, expected a share of training between 0 and 1")
        if self.target_load is not None and not _number(self.target_load):
            raise ConfigError(f"target_load is {self.target_load!r}, expected 0 or more true experts per token")

    def resolve_top_k(self, num_experts: int, original_top_k: int) -> int:
        """K for a model of `num_experts` true experts. Raises ConfigError when it cannot be had or is out of range."""
        total = num_experts + self.num_null_experts
        if self.top_k == "preserve":
            kept = preserving_top_k(num_experts, self.num_null_experts, original_top_k)
            if kept is None:
                raise ConfigError(
                    f"top_k='preserve' with {self.num_null_experts} null and {num_experts} true experts",
                    hint=f"take a multiple of {num_experts} null experts, or name top_k",
                )
            return kept[0]
        if self.top_k > total:
            raise ConfigError(
                f"top_k is {self.top_k} with {num_experts} true and {self.num_null_experts} null experts",
                hint=f"take at most {total}",
            )
        return self.top_k

    def check_target(self, target: float, num_experts: int, top_k: int) -> None:
        """Raises ConfigError when no null bias gives `target` true experts per token with K = top_k."""
        low, high = max(0, top_k - self.num_null_experts), min(top_k, num_experts)
        if not low <= target <= high:
            raise ConfigError(
                f"target_load is {target}, the model can have {low} to {high} true experts per token",
                hint=f"take {low} to {high}, or convert with another top_k",
            )

    def trained_as(self, other: "AdaMoEConfig") -> "AdaMoEConfig":
        """These settings with the other's way of training (`TRAINING`)."""
        return replace(self, **{name: getattr(other, name) for name in TRAINING})

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them; `from_dict` is the way back."""
        return {**asdict(self), "aux_coef": list(self.aux_coef)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdaMoEConfig":
        """Read settings. Raises ConfigError for a name that is none, or when `values` is no mapping."""
        if not isinstance(values, dict):
            raise ConfigError(f"the adamoe settings are {values!r}, expected names and values")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(str(name) for name in set(values) - known):
            raise ConfigError(f"no setting {', '.join(unknown)}", hint=f"there are {', '.join(sorted(known))}")
        return cls(**values)


def check_aux_coef(value: Any) -> tuple[float, float]:
    """The two coefficients of eq. 6. Raises ConfigError when `value` is not two finite numbers of 0 or more."""
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(_number(c) for c in value):
        raise ConfigError(f"aux_coef is {value!r}, expected two numbers of 0 or more")
    return value[0], value[1]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
