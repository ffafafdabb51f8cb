"""A latent diffusion model of handwritten digits that is small enough for any machine.

scikit-learn's 8 x 8 digits in the 4 x 4 x 4 latent space of a tiny AutoencoderKL; the teacher is a
class-conditional UNet2DModel. The weights are shipped; `python -m mlcm.digits DIR` rebuilds them from nothing.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, LCMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

from mlcm.conditioners import ClassCondition
from mlcm.config import MLCMConfig
from mlcm.losses import l2
from mlcm.network import Condition, Denoiser, add_lora, trainable
from mlcm.randomness import RowNoise, initialised_from, seeded
from mlcm.sampling import sample
from mlcm.schedule import NoiseSchedule, inference_times, milestones
from mlcm.train import MLCMTrainer
from mlcm.trajectory import TeacherTrajectory, TrajectoryBank

DATA = Path(str(files("mlcm") / "data"))
WEIGHTS, STUDENT = "digits.safetensors", "digits_student.safetensors"
STUDENT_STEPS, RANK = 300, 16
CLASSES = 10
GUIDANCE = 2.0
SHAPE = (4, 4, 4)
SCHEDULE = NoiseSchedule.stable_diffusion()
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj")


@cache
def images() -> tuple[Tensor, Tensor]:
    """All 1797 digits (count, 1, 8, 8) in [-1, 1] and their labels (count,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def make_autoencoder() -> AutoencoderKL:
    """8 x 8 grey pixels to 4 x 4 x 4 latents."""
    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(16, 32), norm_num_groups=8, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def make_network() -> UNet2DModel:
    """The teacher's network; label 10 is no class."""
    return UNet2DModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False, num_class_embeds=CLASSES + 1,
    )  # fmt: skip


class Reader(nn.Module):
    """A small convolutional classifier; its last hidden layer gives the features of the Fréchet distance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 32), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (batch, 10) of pixels (batch, 1, 8, 8)."""
        return self.head(self.body(pixels))


@dataclass
class DigitWorld:
    """The trained parts. latent = (encoding - mean) / std, per channel."""

    autoencoder: AutoencoderKL
    network: UNet2DModel
    reader: Reader
    mean: Tensor
    std: Tensor

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (batch, 1, 8, 8) to latents (batch, 4, 4, 4)."""
        return (self.autoencoder.encode(pixels).latent_dist.mode() - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [-1, 1]."""
        return self.autoencoder.decode(latents * self.std + self.mean).sample.clamp(-1, 1)

    @torch.no_grad()
    def features(self, latents: Tensor) -> Tensor:
        """Reader's features of decoded latents, (batch, 32)."""
        return self.reader.body(self.decode(latents))

    @torch.no_grad()
    def accuracy(self, latents: Tensor, labels: Tensor) -> float:
        """Share of decoded latents that the reader takes for their class."""
        return float((self.reader(self.decode(latents)).argmax(1) == labels).float().mean())

    def teacher(self) -> Denoiser:
        """The teacher on a network of its own."""
        return Denoiser(copy.deepcopy(self.network), SCHEDULE)

    def state(self) -> dict[str, Tensor]:
        """All weights under prefixed names."""
        parts = {"autoencoder": self.autoencoder, "network": self.network, "reader": self.reader}
        named = {f"{part}.{k}": v for part, module in parts.items() for k, v in module.state_dict().items()}
        return {**named, "mean": self.mean, "std": self.std}


@cache
def load_world(path: Path = DATA / WEIGHTS) -> DigitWorld:
    """The shipped teacher, or one that `main` has rebuilt."""
    from safetensors.torch import load_file

    tensors = {k: v.float() for k, v in load_file(path).items()}
    world = DigitWorld(make_autoencoder(), make_network(), Reader(), tensors["mean"], tensors["std"])
    for part, module in (("autoencoder", world.autoencoder), ("network", world.network), ("reader", world.reader)):
        module.load_state_dict({k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")})
        module.requires_grad_(False).eval()
    return world


def train_world(
    *, autoencoder_steps: int = 500, reader_steps: int = 300, network_steps: int = 2000, batch: int = 64, seed: int = 0
) -> DigitWorld:
    """Train the autoencoder, the reader and the teacher."""
    torch.manual_seed(seed)
    pixels, labels = images()
    generator = seeded(seed, 0)
    autoencoder, reader, network = make_autoencoder(), Reader(), make_network()

    def batches(steps: int, module: nn.Module, lr: float) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        for _ in range(steps):
            index = torch.randint(0, len(pixels), (batch,), generator=generator)
            yield index
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            plan.step()

    for index in batches(autoencoder_steps, autoencoder, 3e-3):
        posterior = autoencoder.encode(pixels[index]).latent_dist
        rebuilt = autoencoder.decode(posterior.sample(generator=generator)).sample
        (functional.mse_loss(rebuilt, pixels[index]) + 1e-4 * posterior.kl().mean() / pixels[0].numel()).backward()
    train = held_in(len(pixels))
    for index in batches(reader_steps, reader, 3e-3):
        index = train[index % len(train)]
        functional.cross_entropy(reader(pixels[index]), labels[index]).backward()
    autoencoder.requires_grad_(False)
    raw = torch.cat([autoencoder.encode(part).latent_dist.mode() for part in pixels.split(256)])
    mean, std = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True)
    latents = (raw - mean) / std
    average = copy.deepcopy(network).requires_grad_(False)
    for index in batches(network_steps, network, 2e-3):
        t = torch.randint(0, SCHEDULE.last + 1, (batch,), generator=generator)
        noise = torch.randn(batch, *SHAPE, generator=generator)
        label = labels[index].masked_fill(torch.rand(batch, generator=generator) < 0.1, CLASSES)
        output = network(SCHEDULE.add_noise(latents[index], noise, t), t, class_labels=label).sample
        functional.mse_loss(output, noise).backward()
        with torch.no_grad():
            for a, p in zip(average.parameters(), network.parameters(), strict=True):
                a.lerp_(p, 0.005)
    return DigitWorld(autoencoder, average, reader, mean, std)


def held_in(count: int) -> Tensor:
    """Indices that the reader is trained on; every fifth digit is held out."""
    index = torch.arange(count)
    return index[index % 5 != 0]


def distil(
    world: DigitWorld,
    *,
    steps: int,
    seed: int,
    first: float = 0.5,
    batch: int = 64,
    stage2: Literal["joint", "sparse", "progressive"] = "joint",
    device: str = "cpu",
    **settings: Any,
) -> Denoiser:
    """Our student: a LoRA on the teacher, by the trainer. first: share of the steps spent on stage 1. Returned on the CPU."""
    config = MLCMConfig(
        segments=8, guidance_scale=GUIDANCE, stage2=stage2, lora_rank=RANK, lora_targets=TARGETS, batch_size=batch,
        learning_rate=2e-3, stage2_learning_rate=2e-3, weight_decay=0.0, lr_schedule="cosine", seed=seed, **settings,
    )  # fmt: skip
    network = copy.deepcopy(world.network)
    trainer = MLCMTrainer(
        network, config, ClassCondition(CLASSES), Accelerator(cpu=device == "cpu"),
        schedule=SCHEDULE, bank=make_bank(world, seed=seed),
    )  # fmt: skip
    trainer.train_stage1(round(steps * first))
    trainer.train_stage2(steps - round(steps * first))
    return Denoiser(network.cpu(), SCHEDULE)


def make_bank(world: DigitWorld, *, seed: int, entries: int = 512) -> TrajectoryBank:
    """The teacher's trajectories from `entries` noises, for stage 1."""
    generator, conditioner = seeded(seed, 8), ClassCondition(CLASSES)

    def batches() -> Iterator[tuple[Tensor, Tensor, Condition]]:
        for _ in range(entries // 128):
            labels = torch.randint(0, CLASSES, (128,), generator=generator)
            yield torch.randn(128, *SHAPE, generator=generator), labels, conditioner(labels)

    trajectory = TeacherTrajectory(world.teacher().guided, SCHEDULE, 8, GUIDANCE)
    return TrajectoryBank.compute(trajectory, batches(), milestones(8))


def load_student(world: DigitWorld) -> Denoiser:
    """The shipped student: the LoRA that `distil` gives."""
    from safetensors.torch import load_file

    network = copy.deepcopy(world.network)
    add_lora(network, RANK, targets=TARGETS)
    network.load_state_dict({k: v.float() for k, v in load_file(DATA / STUDENT).items()}, strict=False)
    return Denoiser(network.requires_grad_(False), SCHEDULE)


def distil_lcm(world: DigitWorld, *, steps: int, seed: int, batch: int = 64, device: str = "cpu") -> Denoiser:
    """The peer: latent consistency distillation on real latents, with the same LoRA, steps and rows.

    Written here, as no library packages its training. Sampled with diffusers' LCMScheduler.
    """
    pixels, labels = images()
    with torch.no_grad():
        latents, labels = world.encode(pixels).to(device), labels.to(device)
    network, schedule = copy.deepcopy(world.network), SCHEDULE.to(device)
    teacher = Denoiser(copy.deepcopy(network).to(device), schedule)
    with initialised_from(seed):
        add_lora(network, RANK, targets=TARGETS)
    network = network.to(device)
    average = copy.deepcopy(network).requires_grad_(False)
    student, target = Denoiser(network, schedule), Denoiser(average, schedule)
    trajectory = TeacherTrajectory(teacher.guided, schedule, 8, GUIDANCE)
    conditioner, own = ClassCondition(CLASSES), list(trainable(network).values())
    averaged = [p for name, p in average.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(own, lr=2e-3, weight_decay=0.0)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    noise = RowNoise([seeded(seed, 9)], batch, device=device)

    def f(model: Denoiser, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        scaled = (t * 10.0).view(-1, 1, 1, 1)
        skip = 0.25 / (scaled**2 + 0.25)
        return skip * z + scaled / (scaled**2 + 0.25).sqrt() * model.x0(z, t, condition)

    for _ in range(steps):
        index = noise.integers(0, len(labels) - 1)
        condition = conditioner(labels[index])
        t = noise.integers(1, 50) * 20 - 1
        n = (t - 20).clamp_min(0)
        z = schedule.add_noise(latents[index], noise.normal(*SHAPE), t)
        neighbour = trajectory.solve(z, t, n, condition)
        with torch.no_grad():
            wanted = f(target, neighbour, n, condition)
        l2(f(student, z, t, condition), wanted).mean().backward()
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        plan.step()
        for a, p in zip(averaged, own, strict=True):
            a.data.lerp_(p.data, 0.05)
    return Denoiser(network.cpu(), SCHEDULE)


@torch.no_grad()
def draw(
    student: Denoiser, noise: Tensor, labels: Tensor, steps: int, *, seed: int = 0, sampler: str = "renoise"
) -> Tensor:
    """Latents of our student in `steps` steps."""
    fresh = RowNoise([seeded(seed, 3)], len(noise))
    times = inference_times(steps, milestones(8))
    condition = ClassCondition(CLASSES)(labels)
    return sample(
        student.x0, SCHEDULE, noise, condition, times=times, noise=lambda: fresh.normal(*SHAPE), sampler=sampler
    )


@torch.no_grad()
def draw_lcm(student: Denoiser, noise: Tensor, labels: Tensor, steps: int, *, seed: int = 0) -> Tensor:
    """Latents of the peer, with diffusers' LCMScheduler."""
    scheduler, z, generator = LCMScheduler(clip_sample=False), noise, seeded(seed, 3)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = student.network(z, t, class_labels=labels).sample
        z = scheduler.step(output, t, z, generator=generator).prev_sample
    return z


def draw_teacher(world: DigitWorld, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Latents of the guided teacher in `steps` DDIM steps."""
    trajectory = TeacherTrajectory(world.teacher().guided, SCHEDULE, 8, GUIDANCE)
    t = torch.zeros(len(noise), dtype=torch.long)
    return trajectory.states(noise, t, ClassCondition(CLASSES)(labels), steps=steps)


def grid(world: DigitWorld, latents: Tensor) -> np.ndarray:
    """Decoded latents side by side, (8, 8 x count), 0 white to 1 black."""
    with torch.no_grad():
        pixels = world.decode(latents)
    return ((pixels.squeeze(1).permute(1, 0, 2).reshape(8, -1) + 1) / 2).numpy()


def main(arguments: Sequence[str]) -> None:
    """Rebuild the weights into a folder: the teacher, then the student."""
    folder = Path(arguments[0]) if arguments else DATA
    write_half(train_world().state(), folder / WEIGHTS)
    write_student(load_world(folder / WEIGHTS), folder)


def write_student(world: DigitWorld, folder: Path) -> None:
    """Distil and write the shipped student's LoRA."""
    network: Any = distil(world, steps=STUDENT_STEPS, seed=0).network
    write_half({k: p.detach() for k, p in trainable(network).items()}, folder / STUDENT)


def write_half(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors in float16, whole or not at all."""
    from safetensors.torch import save_file
    from tenfold_shared.hub import replace_atomically

    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()}
    with replace_atomically(path) as partial:
        save_file(half, partial)


if __name__ == "__main__":
    main(sys.argv[1:])
