"""Models, tokenizers and pipelines from a hub id or a folder, and files that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenfold_shared.errors import UserError


def load_model(loader: Any, name: str | Path, **kwargs: Any) -> Any:
    """`loader.from_pretrained(name)`, safetensors only.

    loader: a class with `from_pretrained` (an AutoModel of transformers, a model or pipeline of diffusers).
    name: hub id or folder. kwargs: passed on; `trust_remote_code` is False unless given.

    Raises UserError, in one line, when the name is neither a folder nor a reachable hub id, or the files are damaged.
    """
    return _load(loader.from_pretrained, name, {"use_safetensors": True, **kwargs})


def load_tokenizer(name: str | Path, **kwargs: Any) -> Any:
    """`AutoTokenizer.from_pretrained(name)` with the errors of `load_model`."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer.from_pretrained, name, kwargs)


def load_pipeline(name: str | Path, loader: Any = None, **kwargs: Any) -> Any:
    """`DiffusionPipeline.from_pretrained(name)` (or another pipeline class), with the errors of `load_model`."""
    if loader is None:
        from diffusers import DiffusionPipeline

        loader = DiffusionPipeline
    # diffusers' `trust_remote_code=False` is its default; passing it on would reach the components' constructors.
    return _load(loader.from_pretrained, name, {"use_safetensors": True, **kwargs}, remote_code=False)


def _load(load: Callable[..., Any], name: str | Path, kwargs: dict[str, Any], remote_code: bool = True) -> Any:
    name = str(name)
    looks_local = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    folder = Path(name).expanduser()
    if looks_local and not folder.is_dir():
        raise UserError(f"model folder '{name}' does not exist", "pass a folder made by save_pretrained, or a hub id")
    if folder.is_dir() and not any(folder.iterdir()):
        raise UserError(f"model folder '{name}' is empty", "pass a folder made by save_pretrained")
    if not folder.is_dir():
        _refuse_unreachable(name)
    if remote_code:
        kwargs.setdefault("trust_remote_code", False)
    try:
        return load(str(folder) if folder.is_dir() else name, **kwargs)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if not folder.is_dir():
            text = f"'{name}' is neither a folder here nor a model that could be loaded from the hub"
            raise UserError(text, "check the id and the network, or pass a folder made by save_pretrained") from error
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"model folder '{name}' could not be loaded ({reason})", hint="save the model again") from error
    except Exception as error:
        # safetensors raises an exception class of its own for a truncated or foreign file.
        if type(error).__name__ != "SafetensorError":
            raise
        text = f"'{name}' holds a damaged safetensors file ({error})"
        raise UserError(text, hint="save or download it again") from error


def _refuse_unreachable(name: str) -> None:
    """Say at once that a model is not here and the hub out of reach: its client tries every file again for a minute."""
    import huggingface_hub as hub
    from huggingface_hub.file_download import repo_folder_name

    cached = Path(hub.constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    if hub.constants.HF_HUB_OFFLINE or cached.is_dir():
        return
    try:
        hub.HfApi().model_info(name, timeout=10)
    except Exception as error:
        # Any other answer is the loader's to explain. The classes are of the HTTP library that the client happens to use.
        if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError"):
            text = f"'{name}' is no folder here and the hub cannot be reached"
            raise UserError(text, "check the id and the network, or pass a folder made by save_pretrained") from error


@contextmanager
def replace_atomically(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling to write a file or a folder to; on leaving it is flushed to disk and takes `path`'s place.

    After an exception, or a kill at any moment, `path` is what it was before. A file is replaced in one rename; a folder
    needs two, and a kill between them leaves the old one beside it under the name `<path>.old`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        partial = scratch / path.name
        yield partial
        for file in [partial] if partial.is_file() else sorted(p for p in partial.rglob("*") if p.is_file()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if partial.is_dir() and path.is_dir():
            old = path.with_name(f"{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
