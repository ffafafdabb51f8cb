"""The official prompt files, and any JSON or JSON-lines list of such records."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tenfold_shared.hub import replace_atomically

from lcmis_align.concepts import Concept, ConceptPlan, bare
from lcmis_align.errors import DataError, PlanError

FIELDS = ("prompt", "first_prompt", "first_describe", "second_prompt", "second_describe")


class LCMisDataset(Sequence[ConceptPlan]):
    """Plans with the keys under which their file holds them.

    Raises DataError when keys and plans differ in number.
    """

    def __init__(self, plans: Sequence[ConceptPlan], *, keys: Sequence[str] | None = None):
        self.plans = list(plans)
        self.keys = [f"prompt{i}" for i in range(len(self.plans))] if keys is None else list(keys)
        if len(self.keys) != len(self.plans):
            raise DataError(f"{len(self.keys)} keys for {len(self.plans)} plans")

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: Any) -> Any:
        return self.plans[index]

    def __iter__(self) -> Iterator[ConceptPlan]:
        return iter(self.plans)

    @classmethod
    def from_json(cls, path: str | Path) -> "LCMisDataset":
        """Read `{"prompt0": {"prompt", "first_prompt", "first_describe", "second_prompt", "second_describe"}, ...}`, or a
        JSON list or JSON-lines file of such records. Unknown fields are kept in each plan's `extra`.

        Raises DataError, with the record and the field, when the file is none of these.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no text file") from error
        if not text.strip():
            raise DataError(f"{path} is empty, expected a JSON object of prompts")
        try:
            data = json.loads(text)
        except json.JSONDecodeError as whole:
            try:
                data = [json.loads(line) for line in text.splitlines() if line.strip()]
            except json.JSONDecodeError:
                raise DataError(f"{path} is no JSON (line {whole.lineno}: {whole.msg})") from whole
        if isinstance(data, dict) and "first_prompt" in data:  # one line of JSON-lines
            data = [data]
        if not isinstance(data, dict | list) or not data:
            raise DataError(f"{path} holds {type(data).__name__}, expected an object or a list of prompts")
        named = isinstance(data, dict)
        items = list(data.items()) if isinstance(data, dict) else [(str(i), record) for i, record in enumerate(data)]
        plans = [from_record(record, f"{path}, {key}") for key, record in items]
        return cls(plans, keys=[key for key, _ in items] if named else None)

    def to_json(self, path: str | Path) -> Path:
        """Write the official layout; what was read is written back the same."""
        records = {key: plan.record() for key, plan in zip(self.keys, self.plans, strict=True)}
        with replace_atomically(path) as partial:
            partial.write_text(json.dumps(records, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load_hub(cls, name: str = "Tutu1/LatentConceptMisalignment", *, files: str = "version1/*") -> "LCMisDataset":
        """The released pairs, from the hub or a local clone of it (needs the extra `hub`).

        Raises DataError when it cannot be reached or holds no such records.
        """
        import datasets

        try:
            loaded = datasets.load_dataset(name, data_files=files, split="train")
        except Exception as error:  # datasets raises errors of many libraries
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"data set {name!r} could not be loaded ({reason[:200]})", hint="check the network"
            ) from error
        rows = [{k: v for k, v in row.items() if v is not None} for row in loaded]
        if rows and "first_prompt" not in rows[0]:  # the official object is read as one row of many columns
            rows = [record for row in rows for record in row.values()]
        return cls([from_record(row, f"{name}, row {i}") for i, row in enumerate(rows)])

    def duplicates(self) -> list[tuple[int, int]]:
        """Pairs of indices whose concepts are the same but for case, articles and order."""
        seen: dict[frozenset[str], int] = {}
        found = []
        for i, plan in enumerate(self.plans):
            key = frozenset((bare(plan.first.name), bare(plan.second.name)))
            if key in seen:
                found.append((seen[key], i))
            seen.setdefault(key, i)
        return found


def from_record(record: Any, where: str = "record") -> ConceptPlan:
    """A plan from an official record. Raises DataError naming `where` and the field."""
    if not isinstance(record, dict):
        raise DataError(f"{where} is {type(record).__name__}, expected an object with {', '.join(FIELDS)}")
    for name in FIELDS:
        value = record.get(name, "" if name.endswith("describe") else None)
        if not isinstance(value, str):
            raise DataError(f"{where} has {name} = {value!r}, expected a text")
    latent = record.get("latent")
    extra = {name: value for name, value in record.items() if name not in (*FIELDS, "latent")}
    try:
        return ConceptPlan(
            Concept(record["first_prompt"], record.get("first_describe", "")),
            Concept(record["second_prompt"], record.get("second_describe", "")),
            record["prompt"], latent, extra,
        )  # fmt: skip
    except PlanError as error:
        raise DataError(f"{where}: {error}") from error
