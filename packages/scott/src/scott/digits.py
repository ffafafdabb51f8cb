"""Handwritten digits, 8 × 8 pixels, with a class-conditional U-Net of diffusers as the teacher.

The same trainer as for Stable Diffusion distils it: one U-Net with adapters, a LoRA discriminator, real data. Quality is
read from the 64 features of a small classifier of the same digits.
"""

import functools
import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scott.conditioners import ClassConditioner
from scott.config import SCottConfig
from scott.data import LatentDataset
from scott.metrics import frechet_distance, prdc
from scott.recipes import Recipe
from scott.schedule import NoiseSchedule
from scott.solvers import draw
from scott.train import SCottTrainer

TEACHER_FILE, CLASSIFIER_FILE = "digits_teacher.safetensors", "digits_classifier.safetensors"
CLASSES, NULL = 11, 10


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [−1, 1] and labels (1797)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def make_unet(seed: int = 0) -> Any:
    """The teacher's architecture: a `UNet2DModel` that predicts ε, with a label for no class."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
            norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=CLASSES,
        )  # fmt: skip


class DigitClassifier(nn.Module):
    """A small convolutional network; its penultimate layer is the feature space of the metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 10) of images (batch, 1, 8, 8)."""
        return self.head(self.body(x))


def split() -> tuple[Tensor, Tensor]:
    """Row numbers for training and for testing the classifier."""
    order = torch.randperm(len(digits()[1]), generator=torch.Generator().manual_seed(0))
    return order[:1400], order[1400:]


def train_classifier(*, iterations: int = 800, batch: int = 128, seed: int = 0) -> DigitClassifier:
    """The feature network, on 1400 of the digits."""
    images, labels = digits()
    rows, generator = split()[0], torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(iterations):
        chosen = rows[torch.randint(0, len(rows), (batch,), generator=generator)]
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def accuracy(model: DigitClassifier) -> float:
    """Share of the held-out digits that the classifier names rightly."""
    images, labels = digits()
    rows = split()[1]
    with torch.no_grad():
        return float((model(images[rows]).argmax(1) == labels[rows]).float().mean())


def train_teacher(*, iterations: int = 1000, batch: int = 64, seed: int = 0) -> Any:
    """The diffusion teacher: ε-prediction, one label in ten left out. Half a minute on one core."""
    images, labels = digits()
    schedule, generator = NoiseSchedule.stable_diffusion(), torch.Generator().manual_seed(seed)
    unet = make_unet(seed).train()
    average = [p.detach().clone() for p in unet.parameters()]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for i in range(iterations):
        rows = torch.randint(0, len(images), (batch,), generator=generator)
        t = torch.randint(0, schedule.timesteps, (batch,), generator=generator)
        noise = torch.randn(batch, 1, 8, 8, generator=generator)
        label = torch.where(torch.rand(batch, generator=generator) < 0.1, NULL, labels[rows])
        z = schedule.add_noise(images[rows], noise, t)
        loss = (unet(z, t, class_labels=label).sample - noise).square().mean()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * i / iterations)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(average, list(unet.parameters()), 0.01)
    with torch.no_grad():
        for p, a in zip(unet.parameters(), average, strict=True):
            p.copy_(a)
    return unet.eval()


def build(folder: Path) -> list[Path]:
    """Train teacher and classifier anew and write them into `folder`; returns the files."""
    from safetensors.torch import save_file
    from tenfold_shared.hub import replace_atomically

    for name, model in ((TEACHER_FILE, train_teacher()), (CLASSIFIER_FILE, train_classifier())):
        with replace_atomically(folder / name) as partial:
            save_file({key: value.half() for key, value in model.state_dict().items()}, partial)
    return [folder / TEACHER_FILE, folder / CLASSIFIER_FILE]


def _shipped(model: Any, name: str) -> Any:
    from safetensors.torch import load_file

    weights = load_file(str(files("scott") / "data" / name))
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    return model.eval().requires_grad_(False)


def teacher() -> Any:
    """The shipped teacher."""
    return _shipped(make_unet(), TEACHER_FILE)


@functools.cache
def classifier() -> DigitClassifier:
    """The shipped classifier."""
    return _shipped(DigitClassifier(), CLASSIFIER_FILE)


def distil(
    recipe: Recipe,
    seed: int,
    *,
    iterations: int = 100,
    batch: int = 32,
    lr: float = 2e-4,
    adv_weight: float = 0.1,
    disc_lr: float = 1e-3,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> SCottTrainer:
    """Distil the shipped teacher, without guidance; returns the trained trainer, ready to sample."""
    images, labels = digits()
    config = SCottConfig.of(dict(
        solver=recipe.solver, noise=recipe.noise, eta=recipe.eta, substeps=recipe.substeps,
        noise_below=recipe.noise_below, adv_weight=adv_weight if recipe.gan else 0.0, guidance=1.0, loss="l2",
        student="full", lr=lr, disc_lr=disc_lr, disc_rank=8, lr_schedule="cosine", batch=batch, iterations=iterations,
        seed=seed,
    ))  # fmt: skip
    trainer = SCottTrainer(
        teacher(), config, schedule=NoiseSchedule.stable_diffusion(), conditioner=ClassConditioner(CLASSES, null=NULL)
    )
    trainer.fit(LatentDataset.of(images, labels.tolist()), progress=progress)
    return trainer


def measure(images: Tensor) -> dict[str, float]:
    """Fréchet distance, coverage, precision and share of images that get the label they were asked for.

    images: (1797, 1, 8, 8), one for each digit of the data, in its order of labels.
    """
    real, labels = digits()
    with torch.no_grad():
        features = [classifier().body(x.clamp(-1, 1)) for x in (real, images)]
        named = classifier().head(features[1]).argmax(1)
    balls = prdc(*features)
    return {
        "frechet": frechet_distance(*features),
        "coverage": balls["coverage"],
        "precision": balls["precision"],
        "label": float((named == labels).float().mean()),
    }


@torch.no_grad()
def teacher_samples(scheduler: Any, *, steps: int, seed: int) -> Tensor:
    """The teacher's samples (1797, 1, 8, 8) with a diffusers scheduler in `steps` calls."""
    _, labels = digits()
    unet, generator = teacher(), torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    z = draw(torch.Size((len(labels), 1, 8, 8)), torch.zeros(()), generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(z, t), t, class_labels=labels).sample
        z = scheduler.step(output, t, z).prev_sample
    return z
