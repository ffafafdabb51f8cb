"""The planner protocol, and what all planners that ask a language model share: checks, retries and the cache of answers."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lcmis_align.concepts import Concept, ConceptPair, ConceptPlan
from lcmis_align.errors import PlannerError
from lcmis_align.planners import roles

log = logging.getLogger(__name__)


@runtime_checkable
class ConceptPlanner(Protocol):
    """Splits a prompt into two concepts in painting order, and thinks of pairs and patterns for mining."""

    def plan(self, prompt: str) -> ConceptPlan: ...

    def propose_pairs(
        self, pattern: str, n: int, *, positives: Sequence[ConceptPair] = (), negatives: Sequence[ConceptPair] = ()
    ) -> list[ConceptPair]: ...


class AnswerCache:
    """Answers in a JSON-lines file, by (role, question, model). Without a path they are kept in memory."""

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self._known: dict[tuple[str, str, str], Any] = {}
        if self.path is not None and self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):  # else the next answer would go on the half line
                self.path.write_text(text + "\n", encoding="utf-8")
            for number, line in enumerate(text.splitlines(), 1):
                try:
                    record = json.loads(line)
                    self._known[record["role"], record["prompt"], record["model"]] = record["answer"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    # A kill in the middle of a write leaves half a line; the rest is as good as it was.
                    log.warning("%s line %d is no answer and is passed over (%s)", self.path, number, error)

    def get(self, role: str, prompt: str, model: str) -> Any | None:
        """The answer, or None."""
        return self._known.get((role, prompt, model))

    def put(self, role: str, prompt: str, model: str, answer: Any) -> None:
        """Remember an answer, and add it to the file."""
        self._known[role, prompt, model] = answer
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            record = {"role": role, "prompt": prompt, "model": model, "answer": answer}
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")


class AskingPlanner:
    """A planner that asks a language model; a subclass says how.

    model: the name under which answers are remembered. cache: JSON-lines file of answers; what is in it is not asked again.
    max_retries: further tries after a wrong answer, each with what was wrong appended.
    """

    def __init__(self, model: str, *, cache: str | Path | None = None, max_retries: int = 3):
        self.model, self.cache, self.max_retries = model, AnswerCache(cache), max_retries

    def complete(self, messages: list[dict[str, str]]) -> str:
        """The model's answer to a conversation. Raises PlannerError when there is none."""
        raise NotImplementedError

    def ask(self, role: roles.Role, **fields: Any) -> Any:
        """Ask until the answer is right, and remember it.

        Raises PlannerError, with the raw text of the last answer, when it is still wrong after `max_retries` more tries.
        """
        question = role.instruction.format(**fields)
        if (known := self.cache.get(role.name, question, self.model)) is not None:
            try:
                return role.check(dict(known), fields)
            except (ValueError, TypeError) as error:  # someone has written in the file
                log.warning("the remembered answer to %s is of no use and is asked for again (%s)", role.name, error)
        messages = [{"role": "user", "content": question}]
        raw, wrong = "", ""
        for _ in range(self.max_retries + 1):
            raw = self.complete(messages)
            try:
                answer = extract_json(raw)
                value = role.check(answer, fields)
            except ValueError as error:
                wrong = str(error)
                log.debug("wrong answer to %s: %s", role.name, wrong)
                messages += [
                    {"role": "assistant", "content": raw},
                    {"role": "user", "content": f"That cannot be used: {wrong}. Answer with the JSON object alone."},
                ]
                continue
            self.cache.put(role.name, question, self.model, answer)
            return value
        excerpt = raw if len(raw) <= 300 else raw[:300] + "..."
        raise PlannerError(
            f"{self.model} gave no usable answer for '{role.name}' in {self.max_retries + 1} tries ({wrong}): {excerpt!r}",
            raw=raw,
        )

    def plan(self, prompt: str) -> ConceptPlan:
        """Split, order, describe, and name the hidden concept."""
        plan: ConceptPlan = self.ask(roles.SPLIT, prompt=prompt)
        latent = self.ask(roles.LATENT, prompt=prompt, first=plan.first.name, second=plan.second.name)
        return ConceptPlan(plan.first, plan.second, prompt, latent)

    def describe(self, concept: str, other: str) -> Concept:
        """The concept with one visual sentence that does not mention `other`."""
        return Concept(concept, self.ask(roles.DESCRIBE, concept=concept, other=other))

    def propose_pairs(
        self, pattern: str, n: int, *, positives: Sequence[ConceptPair] = (), negatives: Sequence[ConceptPair] = ()
    ) -> list[ConceptPair]:
        """`n` or fewer pairs of a pattern. positives: pairs that failed before; negatives: pairs that were drawn well."""
        told = {"positives": _listed(positives), "negatives": _listed(negatives)}
        pairs: list[ConceptPair] = self.ask(roles.PAIRS, pattern=pattern, n=n, **told)
        return pairs

    def propose_patterns(self, patterns: Sequence[str], n: int) -> list[str]:
        """`n` or fewer new patterns in the manner of `patterns`."""
        found: list[str] = self.ask(roles.PATTERNS, patterns="; ".join(patterns), n=n)
        return found

    def blend_patterns(self, one: str, other: str) -> str:
        """A pattern between two."""
        return str(self.ask(roles.BLEND, one=one, other=other))

    def scenes(self, pair: ConceptPair) -> list[str]:
        """Five sentences with both concepts of a pair."""
        found: list[str] = self.ask(roles.SCENES, a=pair.a, b=pair.b)
        return found


def extract_json(text: str) -> dict[str, Any]:
    """The JSON object in an answer, fenced or with words around it. Raises ValueError when there is none."""
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.S)
    body = fenced[1] if fenced else text
    start = body.find("{")
    if start < 0:
        raise ValueError("there is no JSON object in the answer")
    try:
        value, _ = json.JSONDecoder().raw_decode(body[start:])
    except json.JSONDecodeError as error:
        raise ValueError(f"the JSON is broken at character {error.pos}: {error.msg}") from error
    return dict(value)


def _listed(pairs: Sequence[ConceptPair]) -> str:
    return "; ".join(f"{pair.a} / {pair.b}" for pair in pairs) or "none yet"
