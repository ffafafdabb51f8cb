"""Makes `small_models` importable, and holds what is costly enough to be made once."""

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from small_models import IMAGES, calibrated, timm_vit


@pytest.fixture(scope="session")
def small_qann() -> nn.Module:
    """A random timm ViT with ReLU at 16 levels; tests must not change it."""
    return calibrated(timm_vit(), IMAGES)


@pytest.fixture(scope="session")
def learned() -> tuple[nn.Module, Any]:
    """A digits ViT of depth 2 after a few epochs, and the digits."""
    from spikezip.testbed import digits, digits_vit, train

    data = digits(0)
    return train(digits_vit(0, depth=2), data.loader(), epochs=8), data
