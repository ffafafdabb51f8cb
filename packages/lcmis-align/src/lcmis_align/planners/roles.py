"""What a language model is asked for, and what counts as an answer.

Every answer is one JSON object. A check turns it into the value wanted or raises ValueError with what is wrong, which the
model is shown on the next try.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lcmis_align.concepts import Concept, ConceptPair, ConceptPlan, bare


@dataclass(frozen=True)
class Role:
    """instruction: with {fields} in it. check: from (answer, fields) to the value."""

    name: str
    instruction: str
    check: Callable[[dict[str, Any], dict[str, Any]], Any]


def _text(answer: dict[str, Any], key: str) -> str:
    value = answer.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" must be a text that is not empty, it is {value!r}')
    return value.strip()


def _texts(answer: dict[str, Any], key: str, least: int) -> list[str]:
    value = answer.get(key)
    if not isinstance(value, list) or len(value) < least or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError(f'"{key}" must be a list of {least} or more texts, it is {value!r}')
    return [text.strip() for text in value]


def _describe(answer: dict[str, Any], key: str, other: str) -> str:
    sentence = _text(answer, key)
    if f" {bare(other)} " in f" {bare(sentence)} ":
        raise ValueError(f'"{key}" must not mention "{other}", it is {sentence!r}')
    return sentence


def _split(answer: dict[str, Any], fields: dict[str, Any]) -> ConceptPlan:
    a, b = _text(answer, "first_prompt"), _text(answer, "second_prompt")
    first = Concept(a, _describe(answer, "first_describe", b))
    second = Concept(b, _describe(answer, "second_describe", a))
    return ConceptPlan(first, second, fields["prompt"])


def _pairs(answer: dict[str, Any], fields: dict[str, Any]) -> list[ConceptPair]:
    pairs = answer.get("pairs")
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
        raise ValueError(f'"pairs" must be a list of objects, it is {pairs!r}')
    return [
        ConceptPair(_text(p, "a"), _text(p, "b"), _text(p, "prompt"), fields["pattern"])
        for p in pairs[: int(fields["n"])]
    ]


def _latent(answer: dict[str, Any], fields: dict[str, Any]) -> str | None:
    if "latent" not in answer:
        raise ValueError('"latent" is missing')
    return None if answer["latent"] is None else _text(answer, "latent")


SPLIT = Role(
    "split",
    'A picture of "{prompt}" joins two things. Name both and say which a painter puts down first: the container before '
    "what is in it, the place or large form before what covers it, the host before its part. Describe each in one visual "
    'sentence that does not mention the other. Answer with JSON: {{"first_prompt": ..., "second_prompt": ..., '
    '"first_describe": ..., "second_describe": ...}}',
    _split,
)
DESCRIBE = Role(
    "describe",
    'Describe how "{concept}" looks in one short sentence that does not mention "{other}". Answer with JSON: '
    '{{"describe": ...}}',
    lambda answer, fields: _describe(answer, "describe", fields["other"]),
)
LATENT = Role(
    "latent",
    'An image model is asked for "{prompt}" and leaves out "{first}", because "{second}" is nearly always seen with '
    'something else. Name that something in a few words, or null when there is none. Answer with JSON: {{"latent": ...}}',
    _latent,
)
PAIRS = Role(
    "pairs",
    "An image model fails on some pairs of things, since one of them is nearly always seen with a third. Think of {n} new "
    'pairs of the pattern "{pattern}". Pairs on which it failed: {positives}. Pairs that it drew well: {negatives}. Do not '
    'repeat them. Answer with JSON: {{"pairs": [{{"a": ..., "b": ..., "prompt": "a short phrase that joins both"}}, ...]}}',
    _pairs,
)
PATTERNS = Role(
    "patterns",
    "An image model fails on pairs of things of these patterns: {patterns}. Think of {n} new patterns of the same kind, in "
    'a few words each. Answer with JSON: {{"patterns": [...]}}',
    lambda answer, fields: _texts(answer, "patterns", 1)[: int(fields["n"])],
)
BLEND = Role(
    "blend",
    'Blend the patterns "{one}" and "{other}" of pairs of things into one new pattern, in a few words. Answer with JSON: '
    '{{"pattern": ...}}',
    lambda answer, fields: _text(answer, "pattern"),
)
SCENES = Role(
    "scenes",
    'Write five sentences, each a different scene in which "{a}" and "{b}" are both plainly visible. Answer with JSON: '
    '{{"scenes": [...]}}',
    lambda answer, fields: _texts(answer, "scenes", 5)[:5],
)
