"""A planner that needs no model: a small grammar of how two things are joined, and a small lexicon of which comes first.

The first concept is what a painter puts down first: the container before the content, the place before what is in it, the
host before its surface.
"""

import itertools
import re
from collections.abc import Sequence

from lcmis_align.concepts import Concept, ConceptPair, ConceptPlan, bare
from lcmis_align.errors import PlanError, PlannerError

CONTAINERS = {
    "tea cup": "A small ceramic cup with a handle.", "teacup": "A small ceramic cup with a handle.",
    "coffee mug": "A thick ceramic mug with a handle.", "mug": "A thick ceramic mug with a handle.",
    "wine glass": "A stemmed glass with a wide bowl.", "beer glass": "A tall straight glass.",
    "glass": "A clear drinking glass.", "glass cup": "A clear drinking glass.", "bowl": "A round open bowl.",
    "plate": "A flat round plate.", "bottle": "A bottle with a narrow neck.", "vase": "A tall ceramic vase.",
    "bucket": "A round bucket with a handle.", "jar": "A jar with a wide mouth.", "basket": "A woven basket.",
    "box": "A rectangular box.", "teapot": "A round pot with a spout and a handle.", "kettle": "A metal kettle.",
    "champagne flute": "A tall narrow stemmed glass.", "bathtub": "A white bathtub.", "cup": "A cup with a handle.",
    "pan": "A flat frying pan.", "spoon": "A spoon.", "barrel": "A wooden barrel.", "can": "A metal can.",
}  # fmt: skip
USUAL = {
    "iced coke": "glass cup", "coke": "glass cup", "cola": "glass cup", "beer": "beer glass", "wine": "wine glass",
    "red wine": "wine glass", "champagne": "champagne flute", "coffee": "coffee mug", "espresso": "coffee cup",
    "tea": "tea cup", "milk": "glass", "orange juice": "glass", "juice": "glass", "lemonade": "glass", "soup": "bowl",
    "whiskey": "tumbler", "water": "glass", "cocktail": "cocktail glass", "hot chocolate": "coffee mug",
    "flowers": "vase", "noodles": "bowl", "sushi": "plate", "sunflowers": "vase",
}  # fmt: skip
"""Content to what it is nearly always seen in."""
PLACES = (
    "beach", "forest", "desert", "street", "mountain", "great wall", "eiffel tower", "pyramids", "temple", "castle", "city",
    "garden", "kitchen", "room", "table", "field", "lake", "river", "sea", "ocean", "snow", "colosseum", "library",
    "museum", "moon", "park", "road", "roof", "stage", "taj mahal", "market",
)  # fmt: skip
COVERINGS = {
    "zebra": "stripes", "leopard": "spots", "tiger": "stripes", "giraffe": "patches", "peacock": "feathers",
    "snake": "scales",
}  # fmt: skip
PATTERNS = {
    "beverage, wrong container": (tuple(CONTAINERS), tuple(USUAL)),
    "animal, wrong covering": (("horse", "elephant", "cat", "dog", "rabbit", "cow"), tuple(COVERINGS)),
}

# (expression, group drawn first, group drawn second); the first that fits decides.
_RULES = [
    (r"(?P<a>.+?)\s+(?:filled|overflowing|stuffed|brimming)\s+with\s+(?P<b>.+)", "a", "b"),
    (r"(?P<a>.+?)\s+(?:full|made\s+out|made|built|carved\s+out|composed)\s+(?:of|from)\s+(?P<b>.+)", "a", "b"),
    (r"(?P<a>.+?)\s+(?:covered|wrapped|dressed|coated|decorated)\s+(?:in|with|by)\s+(?P<b>.+)", "a", "b"),
    (r"(?P<a>.+?)\s+(?:containing|holding|wearing|with)\s+(?P<b>.+)", "a", "b"),
    (r"(?:an?\s+|the\s+)?(?P<b>[\w' ]+?)[-\s](?:patterned|striped|spotted|textured|skinned|printed|colou?red)\s+(?P<a>.+)",
     "a", "b"),
    (r"(?:an?\s+|the\s+)?(?P<b>[\w' ]+?)[-\s]?flavou?red\s+(?P<a>.+)", "a", "b"),
    (r"(?P<b>.+?)\s+(?:in\s+front\s+of|on\s+top\s+of|next\s+to|inside\s+of|inside|within|into|in|onto|on|at|under|beside|"
     r"near|behind)\s+(?P<a>.+)", "a", "b"),
    (r"(?P<a>.+?)\s+of\s+(?P<b>.+)", "a", "b"),
    (r"(?P<a>.+?)\s*(?:\band\b|,|&|\+)\s*(?P<b>.+)", "a", "b"),
]  # fmt: skip
_COMPILED = [(re.compile(expression, re.I), a, b) for expression, a, b in _RULES]


class RulePlanner:
    """Splits "A of B", "B in/on/inside A", "A filled with B", "A made of B", "A-patterned B", "A-flavoured B", "A and B"."""

    def plan(self, prompt: str, *, first: str | None = None, second: str | None = None) -> ConceptPlan:
        """The plan of a prompt. first, second: the concepts, where they are known.

        Raises PlanError when the prompt is not of a known form.
        """
        text = " ".join(prompt.split()).rstrip(".!") if isinstance(prompt, str) else ""
        if not (first and second):
            first, second = self._split(text, prompt)
        latent = USUAL.get(bare(second))
        hidden = latent if latent and bare(latent) != bare(first) and bare(first) in CONTAINERS else None
        return ConceptPlan(_described(first), _described(second), text or prompt, hidden)

    def propose_pairs(
        self, pattern: str, n: int, *, positives: Sequence[ConceptPair] = (), negatives: Sequence[ConceptPair] = ()
    ) -> list[ConceptPair]:
        """Pairs of the lexicon.

        Raises PlannerError for a pattern that is not in PATTERNS.
        """
        if pattern not in PATTERNS:
            raise PlannerError(
                f"the rule planner knows no pattern {pattern!r}, it knows {'; '.join(map(repr, PATTERNS))}",
                hint="use a language model as the planner",
            )
        seen = {pair.key for pair in (*positives, *negatives)}
        firsts, seconds = PATTERNS[pattern]
        pairs = []
        for a, b in itertools.product(firsts, seconds):
            usual = USUAL.get(b) == a or COVERINGS.get(a) is not None
            prompt = f"a {a} of {b}" if b in USUAL else f"a {b}-patterned {a}"
            pair = ConceptPair(a, b, prompt, pattern)
            if not usual and pair.key not in seen:
                pairs.append(pair)
        # A stride through the table, so that few pairs are different ones.
        return pairs[:: max(1, len(pairs) // n)][:n] if n > 0 else []

    def _split(self, text: str, given: object) -> tuple[str, str]:
        for expression, a, b in _COMPILED:
            found = expression.fullmatch(text)
            if found and bare(found[a]) and bare(found[b]):
                first, second = found[a].strip(), found[b].strip()
                joined = re.fullmatch(r"(?P<a>.+?)\s*(?:\band\b|,|&|\+)\s*(?P<b>.+)", text, re.I)
                if expression is _COMPILED[-1][0] and joined and _rank(second) > _rank(first):
                    first, second = second, first
                return first, second
        raise PlanError(f"could not split {given!r} into two concepts", hint="pass first=... and second=...")


def _rank(text: str) -> int:
    """What is put down earlier ranks higher: a place, then a container."""
    words = bare(text)
    if any(words.endswith(place) for place in PLACES):
        return 2
    return 1 if any(words.endswith(container) for container in CONTAINERS) else 0


def _described(name: str) -> Concept:
    return Concept(name, CONTAINERS.get(bare(name), ""))
