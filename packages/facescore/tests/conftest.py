"""Small models and pipelines in the real formats, made on the spot."""

import json
import os
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: no test asks the network

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from facescore.reward.model import RewardModel, RewardModelConfig
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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


def tokenizer(folder):
    folder.mkdir()
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def text_config(**more):
    return CLIPTextConfig(vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, **more)  # fmt: skip


def tiny_pipeline(name, folder):
    """A random pipeline in the real format, saved and loaded again."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16)
    common = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
              "attention_head_dim": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    scheduler = DDPMScheduler()
    if name == "sd":
        pipe = StableDiffusionPipeline(
            vae, CLIPTextModel(text_config()), tokenizer(folder / "t"), UNet2DConditionModel(cross_attention_dim=16, **common),
            scheduler, None, None, requires_safety_checker=False,
        )  # fmt: skip
        loader = StableDiffusionPipeline
    else:
        unet = UNet2DConditionModel(cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
                                    projection_class_embeddings_input_dim=6 * 4 + 8, **common)  # fmt: skip
        pipe = StableDiffusionXLPipeline(
            vae, CLIPTextModel(text_config()), CLIPTextModelWithProjection(text_config(projection_dim=8)),
            tokenizer(folder / "t"), tokenizer(folder / "u"), unet, scheduler,
        )  # fmt: skip
        loader = StableDiffusionXLPipeline
    pipe.save_pretrained(folder / "pipe")
    fresh = loader.from_pretrained(folder / "pipe")
    fresh.set_progress_bar_config(disable=True)
    return fresh, loader


@pytest.fixture(scope="session")
def make_pipeline():
    return tiny_pipeline
