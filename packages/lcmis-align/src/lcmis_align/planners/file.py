"""A planner that looks plans up in a prompt file."""

from collections.abc import Sequence
from pathlib import Path

from lcmis_align.concepts import ConceptPair, ConceptPlan, bare
from lcmis_align.dataset import LCMisDataset
from lcmis_align.errors import PlannerError


class FilePlanner:
    """Plans from a file in any layout that `LCMisDataset.from_json` reads.

    Raises DataError when the file cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._plans = {bare(plan.prompt): plan for plan in LCMisDataset.from_json(path)}

    def plan(self, prompt: str) -> ConceptPlan:
        """Raises PlannerError when the file has no plan for `prompt`; case and articles do not matter."""
        if (found := self._plans.get(bare(prompt))) is None:
            raise PlannerError(f"{self.path} has no plan for {prompt!r}", hint="add it, or use another planner")
        return found

    def propose_pairs(
        self, pattern: str, n: int, *, positives: Sequence[ConceptPair] = (), negatives: Sequence[ConceptPair] = ()
    ) -> list[ConceptPair]:
        """The file's first `n` pairs that are not among those given, whatever their pattern."""
        seen = {pair.key for pair in (*positives, *negatives)}
        pairs = [ConceptPair(p.first.name, p.second.name, p.prompt, pattern) for p in self._plans.values()]
        return [pair for pair in pairs if pair.key not in seen][:n]
