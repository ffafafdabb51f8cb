import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_mixtures import build


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def _mixtral() -> Any:
    return build()


@pytest.fixture
def mixtral(_mixtral: Any) -> Any:
    return copy.deepcopy(_mixtral)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
