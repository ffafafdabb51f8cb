"""The trainer on small real models: one U-Net, resumed runs, several processes."""

import pytest
import torch
from scott import LatentDataset, NoiseSchedule, SCottConfig, SCottTrainer
from scott.conditioners import ClassConditioner
from tenfold_shared.errors import UserError

SMALL = {"rank": 2, "disc_rank": 2, "batch": 4, "iterations": 4, "checkpoint_every": 2, "lr": 1e-3, "disc_lr": 1e-3}


def digits_like(n=8, channels=1):
    return LatentDataset.of(
        torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(3)), [i % 4 for i in range(n)]
    )


def class_trainer(unet, **settings):
    config = SCottConfig(**{**SMALL, "guidance": 1.0, **settings})
    return SCottTrainer(
        unet, config, schedule=NoiseSchedule.stable_diffusion(), conditioner=ClassConditioner(5, null=4)
    )


def test_smoke(class_unet, sd, tmp_path):
    trainer = class_trainer(class_unet)
    print(trainer.fit(digits_like(), output=tmp_path))
    config = SCottConfig(**SMALL)
    trainer = SCottTrainer(sd, config)
    print(trainer.fit(digits_like(channels=4), output=tmp_path / "b"))
