"""The mixture-of-experts families of transformers: where the router is, and how it scores.

`register(Family(...))` adds one; nothing else in the package knows a family by name.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from adamoe.errors import UnknownFamilyError


@dataclass(frozen=True)
class Family:
    """What distinguishes one model type's routing from another's."""

    model_type: str
    router: str
    """Name of the router class in the family's modelling module."""
    attribute: str = "gate"
    """Name of the router in the expert block."""
    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    """Weights before normalisation. A softmax over the selected logits is a normalised softmax."""
    normalise: bool | str = True
    """Whether weights are divided by their sum over the selected; a string names the router's attribute."""
    scaling: str | None = None
    """The router's attribute that multiplies the weights."""
    groups: bool = False
    """Whether selection is limited to the best groups of experts (`num_group`, `topk_group`)."""
    correction: str | None = None
    """Path, from the router, of the bias added to the scores for selection only."""
    float32: bool = False
    """Whether logits are computed in float32."""
    autocast: bool = True
    """Whether autocast reaches the logits."""
    eager: bool = True
    """Whether the family's own eager expert path knows an empty slot."""
    modelling: str | None = None
    """Module of the router class when it is not transformers' own for this type."""

    def module(self) -> Any:
        """The module that defines the family's classes."""
        return importlib.import_module(
            self.modelling or f"transformers.models.{self.model_type}.modeling_{self.model_type}"
        )

    def router_class(self) -> type:
        """The stock router class."""
        return getattr(self.module(), self.router)


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Add or replace a family."""
    FAMILIES[family.model_type] = family


def family_of(model_type: str) -> Family:
    """The family of a model type. Raises UnknownFamilyError, which lists the known ones."""
    if model_type not in FAMILIES:
        own = sorted(name for name, family in FAMILIES.items() if family.modelling is None)
        raise UnknownFamilyError(
            f"no family is registered for model type '{model_type}'; there are {', '.join(own)}",
            hint="add one with adamoe.families.register, or use adamoe.molora for a dense model",
        )
    return FAMILIES[model_type]


for _family in (
    Family("mixtral", "MixtralTopKRouter"),
    Family("qwen2_moe", "Qwen2MoeTopKRouter", normalise="norm_topk_prob"),
    Family("qwen3_moe", "Qwen3MoeTopKRouter", normalise="norm_topk_prob"),
    Family("olmoe", "OlmoeTopKRouter", normalise="norm_topk_prob"),
    Family("phimoe", "PhimoeTopKRouter", attribute="router", score="sparsemixer", normalise=False),
    Family(
        "deepseek_v2", "DeepseekV2TopkRouter", normalise=False, scaling="routed_scaling_factor", groups=True, float32=True
    ),
    Family(
        "deepseek_v3", "DeepseekV3TopkRouter", score="sigmoid", normalise="norm_topk_prob", scaling="routed_scaling_factor",
        groups=True, correction="e_score_correction_bias", float32=True,
    ),
    Family(
        "glm4_moe", "Glm4MoeTopkRouter", score="sigmoid", normalise="norm_topk_prob", scaling="routed_scaling_factor",
        groups=True, correction="e_score_correction_bias", float32=True,
    ),
    Family("granitemoe", "GraniteMoeTopKRouter", attribute="router"),
    Family("gpt_oss", "GptOssTopKRouter", attribute="router", eager=False),
    Family(
        "ernie4_5_moe", "Ernie4_5_MoeTopKRouter", correction="moe_statics.e_score_correction_bias", float32=True,
        autocast=False,
    ),
    Family("jamba", "JambaTopKRouter", attribute="router", normalise=False),
):  # fmt: skip
    register(_family)
