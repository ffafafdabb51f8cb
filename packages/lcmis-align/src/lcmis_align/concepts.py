"""The nouns of the method: a concept, a pair of concepts, and the plan by which a prompt is drawn."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from lcmis_align.errors import PlanError


@dataclass(frozen=True)
class Concept:
    """Something that must be visible. `describe`: one visual sentence about it that names no other concept, or empty."""

    name: str
    describe: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise PlanError(f"a concept is named {self.name!r}, expected words")
        if not isinstance(self.describe, str):
            raise PlanError(f"the description of {self.name!r} is {self.describe!r}, expected a sentence")

    @property
    def texts(self) -> list[str]:
        """What an image is compared with: the name, and the description where there is one."""
        return [self.name, self.describe] if self.describe else [self.name]


@dataclass(frozen=True)
class ConceptPair:
    """Two concepts that a prompt joins, in no order yet. `pattern`: the kind of pair, such as "beverage, wrong container"."""

    a: str
    b: str
    prompt: str = ""
    pattern: str = ""

    def __post_init__(self) -> None:
        for name in (self.a, self.b):
            if not isinstance(name, str) or not name.strip():
                raise PlanError(f"a pair holds {name!r}, expected the words of a concept")

    @property
    def text(self) -> str:
        """The prompt, "a and b" when none was given."""
        return self.prompt or f"{self.a} and {self.b}"

    @property
    def key(self) -> frozenset[str]:
        """Equal for pairs that differ in case, articles, spaces or order alone."""
        return frozenset((bare(self.a), bare(self.b)))


@dataclass(frozen=True)
class ConceptPlan:
    """How a prompt is drawn: `first` alone, then the whole `prompt`, in which `second` tends to win.

    latent: the concept that nobody mentioned and the model draws instead of `first`, where it is known.
    extra: whatever else the record came with.
    """

    first: Concept
    second: Concept
    prompt: str
    latent: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise PlanError(f"the prompt of a plan is {self.prompt!r}, expected words")
        if bare(self.first.name) == bare(self.second.name):
            raise PlanError(f"both concepts of {self.prompt!r} are {self.first.name!r}", hint="name two concepts")
        if self.latent is not None and (not isinstance(self.latent, str) or not self.latent.strip()):
            raise PlanError(f"the latent concept of {self.prompt!r} is {self.latent!r}, expected words or nothing")

    def record(self) -> dict[str, Any]:
        """The plan in the official prompt file's fields."""
        latent = {} if self.latent is None else {"latent": self.latent}
        first, second = asdict(self.first), asdict(self.second)
        return {
            "prompt": self.prompt,
            "first_prompt": first["name"],
            "first_describe": first["describe"],
            "second_prompt": second["name"],
            "second_describe": second["describe"],
            **latent,
            **self.extra,
        }


def bare(text: str) -> str:
    """`text` in lower case, without articles, punctuation and double spaces: what two names are compared by."""
    words = re.sub(r"[^\w\s-]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
