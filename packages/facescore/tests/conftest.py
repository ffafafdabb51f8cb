"""Small models and pipelines in the real formats, made on the spot."""

import os
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: no test asks the network

import numpy as np
import pytest
import torch
from facescore.reward.model import RewardModel, RewardModelConfig
from PIL import Image

TINY = RewardModelConfig(
    image_size=16, patch_size=4, vision_width=32, vision_depth=3, vision_heads=2, vision_mlp=48,
    text_width=24, text_depth=2, text_heads=2, text_mlp=40, vocabulary=40, positions=40,
    head_widths=(20, 16, 8, 4, 1), text_dropout=0.0, prompt_ids=(2, 5, 6, 7, 3), pad_to=12,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def randomise(model: RewardModel, seed: int = 0) -> RewardModel:
    """Weights large enough that every layer matters; a fresh head's output is almost zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "head" in name or parameter.ndim < 2 else 0.15
            offset = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def reward() -> RewardModel:
    return randomise(RewardModel(TINY))


@pytest.fixture
def make_reward():
    return lambda seed=0, **changes: randomise(RewardModel(replace(TINY, **changes)), seed)


@pytest.fixture
def picture(tmp_path):
    """A function that writes a random picture and returns its path."""

    def write(name: str = "a.png", size: tuple[int, int] = (40, 30), seed: int = 0, mode: str = "RGB"):
        channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "L": 1, "LA": 2}[mode]
        array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
        image = Image.fromarray(array.squeeze(), mode=mode) if channels != 2 else Image.new("LA", size, (90, 128))
        image.save(tmp_path / name)
        return tmp_path / name

    return write
