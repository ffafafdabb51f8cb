"""Finding misaligned pairs: a planner thinks of pairs, the model draws them, a judge rates them, the planner learns of both.

Every rated pair is written at once, so a run that was stopped goes on where it was.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tenfold_shared.errors import UserError

from lcmis_align.concepts import Concept, ConceptPair, ConceptPlan
from lcmis_align.errors import DataError
from lcmis_align.levels import Judge, LevelReport, judge, rate_level
from lcmis_align.planners.base import ConceptPlanner
from lcmis_align.schedule import PromptSchedule


@dataclass(frozen=True)
class Mined:
    """A pair, how many of its images are correct, and its level."""

    a: str
    b: str
    prompt: str
    pattern: str
    correct: int
    images: int
    level: int

    @property
    def pair(self) -> ConceptPair:
        return ConceptPair(self.a, self.b, self.prompt, self.pattern)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share of correct images."""
        from lcmis_align.levels import wilson

        return wilson(self.correct, self.images)


def mine(
    planner: ConceptPlanner, pattern: str, *, pipe: Any, judge_image: Judge, n: int = 15, rounds: int = 1,
    images: int = 20, seeds: Sequence[int] | None = None, output: Path | None = None,
    progress: Callable[[Mined], Any] | None = None, **arguments: Any,
) -> list[Mined]:  # fmt: skip
    """Rate `rounds` times up to `n` pairs of a pattern by `images` plain samples each.

    From the second round on the planner is told which pairs failed (level 5) and which were drawn well.
    output: JSON-lines file of the rated pairs; those in it are not rated again, and a planner that answers as before is
    told as before. Pairs in it that nobody proposes come last. arguments: the pipeline's own.

    Raises UserError for numbers under 1, PlannerError, DataError when `output` is no such file.
    """
    if min(n, rounds, images) < 1:
        raise UserError(f"n, rounds and images are {n}, {rounds}, {images}, expected 1 or more")
    numbers = list(range(images)) if seeds is None else list(seeds)
    before = read_mined(output) if output is not None and output.exists() else []
    rated = {mined.pair.key: mined for mined in before}
    found: list[Mined] = []
    known: set[frozenset[str]] = set()
    for _ in range(rounds):
        positives = [m.pair for m in found if m.level == 5]
        negatives = [m.pair for m in found if m.level < 5]
        for pair in planner.propose_pairs(pattern, n, positives=positives, negatives=negatives):
            if pair.key in known:
                continue
            known.add(pair.key)
            if pair.key in rated:
                found.append(rated[pair.key])
                continue
            drawn = PromptSchedule([(pair.text, 1.0)]).run(pipe, seeds=numbers, **arguments)
            plan = ConceptPlan(Concept(pair.a), Concept(pair.b), pair.text)
            correct = sum(judge(drawn, plan, judge_image))
            level = rate_level(correct, len(drawn))
            mined = Mined(pair.a, pair.b, pair.text, pattern, correct, len(drawn), level)
            found.append(mined)
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                with output.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(asdict(mined), ensure_ascii=False) + "\n")
            if progress is not None:
                progress(mined)
    return found + [mined for mined in before if mined.pair.key not in known]


def read_mined(path: Path) -> list[Mined]:
    """Rated pairs of a JSON-lines file. Raises DataError, with the line, when it is none."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Mined(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise DataError(f"{path} line {number} is no rated pair ({error})", hint="remove the line") from error
    return found


def report(mined: Sequence[Mined]) -> LevelReport:
    """The levels of mined pairs."""
    return LevelReport([m.prompt for m in mined], [m.correct for m in mined], [m.images for m in mined])
