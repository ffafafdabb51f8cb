"""One thread: the networks are too small for more."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["sd", "sdxl"])
def saved(request, tmp_path_factory) -> Path:
    """A tiny pipeline of each kind, saved."""
    from mlcm.testbed import tiny_pipeline

    folder = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(xl=request.param == "sdxl").save_pretrained(folder)
    (folder / "prompts.txt").write_text("a red ball\na blue cube\n\na green cat\n")
    return folder


@pytest.fixture
def pipe(saved: Path) -> Iterator:
    from tenfold_shared.hub import load_pipeline

    loaded = load_pipeline(saved)
    loaded.set_progress_bar_config(disable=True)
    return loaded
