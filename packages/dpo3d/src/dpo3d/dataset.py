"""Preference data and prompts from a file, a saved folder or the hub, with one clear error each."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_split(name: str, split: str = "train", *, config: str | None = None) -> Dataset:
    """One split. name: a .json, .jsonl, .csv or .parquet file, a folder made by `save_to_disk`, or a hub id.

    Raises UserError when it is none of them, is empty or damaged, or has no such split.
    """
    path = Path(name).expanduser()
    if path.suffix in FORMATS:
        if not path.is_file():
            raise UserError(f"data file '{name}' does not exist")
        if path.stat().st_size == 0:
            raise UserError(f"data file '{name}' is empty")
        data = _guarded(name, load_dataset, FORMATS[path.suffix], data_files=str(path), split="train")
    elif path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        data = _guarded(name, load_from_disk, str(path))
        if isinstance(data, DatasetDict):
            if split not in data:
                raise UserError(f"'{name}' has no split '{split}'", hint=f"there are {', '.join(data)}")
            data = data[split]
    elif path.is_absolute() or name.startswith((".", "~")) or (path.exists() and not path.is_dir()):
        raise UserError(
            f"'{name}' is no data file or saved dataset", hint="expected .json, .jsonl, .csv, .parquet or save_to_disk"
        )
    else:
        data = _guarded(name, load_dataset, name, config, split=split)
    if len(data) == 0:
        raise UserError(f"'{name}' has no rows")
    return data


def _guarded(name: str, load: Any, *arguments: Any, **keywords: Any) -> Any:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from pyarrow import ArrowInvalid

    try:
        return load(*arguments, **keywords)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise UserError(
            f"'{name}' is neither a data file here nor a dataset that could be loaded from the hub",
            hint="check the id and the network",
        ) from error
    except (DatasetGenerationError, ArrowInvalid, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0][:160]
        raise UserError(f"'{name}' could not be read ({reason})", hint="expected one record per line") from error


def write_records(path: Path, records: Any) -> Path:
    """Write dictionaries as JSON lines, whole or not at all."""
    with replace_atomically(path) as partial:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        partial.write_text("".join(lines), encoding="utf-8")
    return path
