"""The offline world: the exact mixture in the plane, and digits in a tiny latent space.

On the mixture students of several seeds train side by side in one batched network: member i draws every number from
generators seeded by its own seed and shares none with its neighbours.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlcm.distill import Pairs, consistency_loss, milestone_pairs, predictions, segment_pairs
from mlcm.losses import l2
from mlcm.metrics import coverage, sliced_wasserstein
from mlcm.mixture import GaussianMixture
from mlcm.network import Condition, Student
from mlcm.randomness import RowNoise, seeded
from mlcm.rewards import RewardLoss
from mlcm.sampling import sample
from mlcm.schedule import NoiseSchedule, inference_times, milestones
from mlcm.trajectory import TeacherTrajectory

DATA = files("mlcm") / "data"
MIXTURE_WEIGHTS = "mixture_denoiser.safetensors"


class MemberLinear(nn.Module):
    """Linear layers side by side: (members, batch, inputs) to (members, batch, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator):
        super().__init__()
        weight = (torch.rand(inputs, outputs, generator=generator) * 2 - 1) * inputs**-0.5
        self.weight = nn.Parameter(weight.repeat(members, 1, 1))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class PlaneStudent(nn.Module):
    """3 x 128 SiLU network on (point, time, class) that predicts v; `members` copies side by side.

    A batch holds the members' rows one after the other, equally many of each.
    """

    def __init__(self, schedule: NoiseSchedule, classes: int, members: int = 1, *, width: int = 128):
        super().__init__()
        self.schedule = NoiseSchedule(schedule.alphas[:-1], schedule.sigmas[:-1], prediction_type="v_prediction")
        self.classes, self.members = classes, members
        self.register_buffer("waves", torch.exp(torch.linspace(0, math.log(200), 16)), persistent=False)
        generator = torch.Generator().manual_seed(0)
        widths = [2 + 32 + classes + 1, width, width, width, 2]
        self.layers = nn.ModuleList(MemberLinear(members, a, b, generator) for a, b in itertools.pairwise(widths))

    def forward(self, z: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """v at (z, t). z: (members x batch, 2); t, class_labels: long (members x batch,)."""
        phase = t[:, None] / 1000 * self.waves
        h = torch.cat([z, phase.sin(), phase.cos(), functional.one_hot(class_labels, self.classes + 1).to(z.dtype)], 1)
        h = h.view(self.members, -1, h.shape[1])
        for layer in self.layers[:-1]:
            h = functional.silu(layer(h))
        return self.layers[-1](h).flatten(0, 1)

    def x0(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x̂ at (z, t) under a condition."""
        return self.schedule.predict_x0(self(z, t, **condition.given), z, t)


@dataclass(frozen=True)
class Recipe:
    """One way to distil on the mixture.

    target: what is made consistent: "lcm", "tcd" and "pcm" on noised real points (written here, as no library packages their
    training), "segments" (stage 1), "sparse", "joint", "progressive". first: share of the iterations spent on stage 1 before.
    weighting: of stage 2's milestones.
    """

    name: str
    target: str
    first: float = 0.0
    ema: float = 0.0
    weighting: str = "velocity"


RECIPES = {
    r.name: r
    for r in (
        Recipe("LCM", "lcm", ema=0.95),
        Recipe("TCD", "tcd", ema=0.95),
        Recipe("PCM-like", "pcm"),
        Recipe("stage 1", "segments"),
        Recipe("sequential", "sparse", first=0.5, weighting="uniform"),
        Recipe("joint", "joint", first=0.1),
        Recipe("joint, uniform", "joint", first=0.1, weighting="uniform"),
        Recipe("progressive", "progressive"),
    )
}


def boundary(student: Student, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """LCM's consistency function, c_skip z + c_out x̂, with the scalings of diffusers' LCMScheduler."""
    scaled = (t * 10.0)[:, None]
    skip = 0.25 / (scaled**2 + 0.25)
    return skip * z + scaled / (scaled**2 + 0.25).sqrt() * student(z, t, condition)


class Distillation:
    """Students of several seeds distilled side by side from the mixture."""

    def __init__(
        self, mixture: GaussianMixture, recipe: Recipe, seeds: Sequence[int], *,
        iterations: int = 2500, batch: int = 256, guidance_scale: float = 1.0, segments: int = 8, skip: int = 20,
        initial: PlaneStudent | None = None, lr: float = 1e-3
    ):  # fmt: skip
        self.mixture, self.recipe, self.iterations, self.batch, self.skip = mixture, recipe, iterations, batch, skip
        self.schedule, self.guidance_scale, self.segments = mixture.schedule, guidance_scale, segments
        self.trajectory = TeacherTrajectory(mixture, mixture.schedule, segments, guidance_scale)
        self.student = side_by_side(initial or plane_denoiser(), len(seeds))
        self.average = side_by_side(initial or plane_denoiser(), len(seeds)).requires_grad_(False)
        self.generators = [seeded(seed, 1) for seed in seeds]
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=lr)
        self.plan = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, iterations)
        self.seconds, self.teacher_calls = 0.0, 0

    def run(self) -> "Distillation":
        """Train; `seconds` and the mixture's `calls` tell the cost."""
        started, self.mixture.calls = time.perf_counter(), 0
        for i in range(self.iterations):
            self.optimizer.zero_grad()
            # Every member's gradient is its own: the sum over members does not mix them.
            loss = self._loss(i / self.iterations).view(self.student.members, -1).mean(1).sum()
            loss.backward()
            clip_members(self.student)
            self.optimizer.step()
            self.plan.step()
            if self.recipe.ema:
                for a, p in zip(self.average.parameters(), self.student.parameters(), strict=True):
                    a.data.lerp_(p.data, 1 - self.recipe.ema)
        self.seconds = time.perf_counter() - started
        self.teacher_calls = self.mixture.calls
        self.student.requires_grad_(False)
        return self

    def _loss(self, progress: float) -> Tensor:
        target = self.recipe.target
        if target in ("lcm", "tcd"):
            return self._real_data(target)
        if target == "joint" and progress >= self.recipe.first:
            halves = [self._segments(self.segments, self.batch), self._sparse(self.batch)]
            pairs = interleave(halves, self.student.members)
        elif target == "sparse" and progress >= self.recipe.first:
            pairs = self._sparse(self.batch)
        elif target == "progressive":
            pairs = self._segments(self.segments >> min(int(progress * 3), 2), self.batch)
        elif target == "pcm":
            pairs = self._segments(self.segments, self.batch, real=True)
        else:
            pairs = self._segments(self.segments, self.batch)
        return consistency_loss(self.student.x0, self.schedule, pairs, l2)

    def _draws(self, rows: int) -> tuple[RowNoise, Condition]:
        labels = torch.cat(
            [
                torch.multinomial(self.mixture.class_weights, rows, replacement=True, generator=g)
                for g in self.generators
            ]
        )
        return RowNoise(self.generators, rows), self.mixture.condition(labels)

    def _points(self, rows: int) -> tuple[Tensor, Condition]:
        x, labels = zip(*(self.mixture.sample(rows, g) for g in self.generators), strict=True)
        return torch.cat(x), self.mixture.condition(torch.cat(labels))

    def _segments(self, segments: int, rows: int, *, real: bool = False) -> Pairs:
        times = milestones(segments)
        noise, condition = self._draws(rows)
        start = noise.normal(2)
        if real:
            x, condition = self._points(rows)

            def noised(t: Tensor) -> tuple[Tensor, Tensor]:
                return self.schedule.add_noise(x, start, t), t

        return segment_pairs(
            self.student.x0, self.trajectory, condition, noise,
            start=noised if real else start, milestones=times, skip=self.skip,
        )  # fmt: skip

    def _sparse(self, rows: int) -> Pairs:
        noise, condition = self._draws(rows)
        start = noise.normal(2)
        return milestone_pairs(
            self.student.x0, self.trajectory, condition, noise,
            start=start, milestones=milestones(self.segments), weighting=self.recipe.weighting,
        )  # fmt: skip

    def _real_data(self, target: str) -> Tensor:
        x, condition = self._points(self.batch)
        noise = RowNoise(self.generators, self.batch)
        t = noise.integers(1, 50) * 20 - 1
        n = (t - 20).clamp_min(0)
        z = self.schedule.add_noise(x, noise.normal(2), t)
        neighbour = self.trajectory.solve(z, t, n, condition)
        if target == "lcm":
            with torch.no_grad():
                wanted = boundary(self.average.x0, neighbour, n, condition)
            return l2(boundary(self.student.x0, z, t, condition), wanted)
        end = noise.integers(0, n)
        with torch.no_grad():
            wanted = self.schedule.jump(neighbour, self.average.x0(neighbour, n, condition), n, end)
        return l2(self.schedule.jump(z, self.student.x0(z, t, condition), t, end), wanted)


def interleave(halves: Sequence[Pairs], members: int) -> Pairs:
    """Two batches of all members as one in which every member's rows lie together."""
    joined = Pairs.cat(halves)
    return joined.rows(torch.arange(len(joined.t)).view(len(halves), members, -1).transpose(0, 1).flatten())


def clip_members(student: PlaneStudent, most: float = 1.0) -> None:
    """Clip the norm of each member's gradient to `most`."""
    gradients = [p.grad for p in student.parameters()]
    norms = torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0).sqrt()
    scale = (most / norms.clamp_min(1e-12)).clamp_max(1)
    for g in gradients:
        g.mul_(scale.view(-1, 1, 1))


def side_by_side(student: PlaneStudent, members: int) -> PlaneStudent:
    """`members` copies of a one-member student."""
    copies = PlaneStudent(student.schedule, student.classes, members, width=student.layers[0].bias.shape[2])
    copies.load_state_dict({k: v.repeat(members, 1, 1) for k, v in student.state_dict().items()})
    return copies


def train_plane_denoiser(mixture: GaussianMixture, *, iterations: int = 4000, batch: int = 512) -> PlaneStudent:
    """What every student starts from: the teacher's v by regression at noised points, the class dropped in a tenth."""
    student, generator = PlaneStudent(mixture.schedule, mixture.classes), seeded(0, 0)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        x, labels = mixture.sample(batch, generator)
        labels[torch.rand(batch, generator=generator) < 0.1] = mixture.classes
        t = torch.randint(0, mixture.schedule.last + 1, (batch,), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        z = mixture.schedule.add_noise(x, noise, t)
        x0 = mixture.x0(z, t, mixture.condition(labels))
        velocity = (mixture.schedule.alpha(t, z) * z - x0) / mixture.schedule.sigma(t, z)
        loss = l2(student(z, t, labels), velocity).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return student.requires_grad_(False)


def write_plane_denoiser(folder: str | Path) -> None:
    """Rebuild the shipped weights of `plane_denoiser`, about a minute on one core."""
    from safetensors.torch import save_file
    from tenfold_shared.hub import replace_atomically

    with replace_atomically(Path(folder) / MIXTURE_WEIGHTS) as partial:
        save_file(train_plane_denoiser(GaussianMixture.rings()).state_dict(), partial)


@cache
def plane_denoiser() -> PlaneStudent:
    """The shipped weights of `train_plane_denoiser`."""
    from safetensors.torch import load_file

    mixture = GaussianMixture.rings()
    student = PlaneStudent(mixture.schedule, mixture.classes)
    student.load_state_dict(load_file(Path(str(DATA / MIXTURE_WEIGHTS))))
    return student.requires_grad_(False)


@dataclass(frozen=True)
class Reference:
    """What samples on the mixture are compared with: the ends of the exact flow from the same noise."""

    noise: Tensor
    condition: Condition
    ends: Tensor
    points: Tensor
    """Where the guided flow ends, from other noise; without guidance draws of the mixture itself."""

    def score(self, mixture: GaussianMixture, samples: Tensor) -> dict[str, float]:
        """Sliced W2, coverage, share of far points, RMSE to the end of the exact flow."""
        return {
            "sw2": sliced_wasserstein(samples, self.points),
            "coverage": coverage(self.points[:2000], samples[:2000]),
            "far": mixture.far(samples),
            "rmse": float((samples - self.ends).square().sum(1).mean().sqrt()),
        }


def make_reference(mixture: GaussianMixture, *, guidance_scale: float, seed: int, count: int = 4000) -> Reference:
    """Draw the noise and follow the exact flow in 400 steps."""
    generator = seeded(seed, 2)
    trajectory = TeacherTrajectory(mixture, mixture.schedule, 8, guidance_scale)

    def ends() -> tuple[Tensor, Condition, Tensor]:
        labels = torch.multinomial(mixture.class_weights, count, replacement=True, generator=generator)
        noise, condition = torch.randn(count, 2, generator=generator), mixture.condition(labels)
        t = torch.zeros(count, dtype=torch.long)
        return noise, condition, trajectory.states(noise, t, condition, steps=200)

    noise, condition, end = ends()
    points = mixture.sample(count, generator)[0] if guidance_scale == 1 else ends()[2]
    return Reference(noise, condition, end, points)


def student_points(
    student: PlaneStudent, member: int, reference: Reference, steps: int, *, sampler: str = "renoise", seed: int = 0
) -> Tensor:
    """Samples of one member from the reference's noise."""
    one = only(student, member)
    fresh = RowNoise([seeded(seed, 3)], len(reference.noise))
    times = inference_times(steps, milestones(8))
    return sample(
        one.x0, one.schedule, reference.noise, reference.condition,
        times=times, noise=lambda: fresh.normal(2), sampler=sampler,
    )  # fmt: skip


def scheduler_points(
    student: PlaneStudent,
    member: int,
    reference: Reference,
    steps: int,
    scheduler: str,
    *,
    gamma: float = 0.3,
    seed: int = 0,
) -> Tensor:
    """Samples of one member with diffusers' own LCMScheduler or TCDScheduler."""
    import diffusers

    loop = getattr(diffusers, scheduler)(
        prediction_type="v_prediction", beta_schedule="scaled_linear", clip_sample=False
    )
    loop.set_timesteps(steps)
    one, z, generator = only(student, member), reference.noise, seeded(seed, 3)
    more = {"eta": gamma} if scheduler == "TCDScheduler" else {}
    labels = reference.condition.given["class_labels"]
    for t in loop.timesteps:
        output = one(z, t.expand(len(z)), labels)
        z = loop.step(output, t, z, generator=generator, **more).prev_sample
    return z


def teacher_points(mixture: GaussianMixture, reference: Reference, steps: int, *, guidance_scale: float) -> Tensor:
    """Samples of the exact teacher in `steps` DDIM steps."""
    trajectory = TeacherTrajectory(mixture, mixture.schedule, 8, guidance_scale)
    t = torch.zeros(len(reference.noise), dtype=torch.long)
    return trajectory.states(reference.noise, t, reference.condition, steps=steps)


def only(student: PlaneStudent, member: int) -> PlaneStudent:
    """One member by itself."""
    one = PlaneStudent(student.schedule, student.classes, width=student.layers[0].bias.shape[2])
    one.load_state_dict({k: v[member : member + 1] for k, v in student.state_dict().items()})
    return one.requires_grad_(False)


def tiny_pipeline(*, xl: bool = False, seed: int = 0) -> Any:
    """A random Stable Diffusion or SDXL pipeline of 32 x 32 pixels, built on the spot; real classes, real file layout."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    width = 32
    text = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    more: dict[str, Any] = {"cross_attention_dim": width, "attention_head_dim": 4}
    if xl:
        more = {
            "cross_attention_dim": 2 * width,
            "attention_head_dim": (2, 4),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2),
            "projection_class_embeddings_input_dim": 6 * 8 + width,
            "use_linear_projection": True,
        }
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=8, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "unet": unet, "vae": vae, "scheduler": scheduler, "text_encoder": CLIPTextModel(text), "tokenizer": byte_tokenizer(),
    }  # fmt: skip
    if xl:
        second = CLIPTextModelWithProjection(text)
        pipe = StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=byte_tokenizer(), add_watermarker=False
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_clip(folder: str | Path) -> None:
    """Save a random CLIP model with its tokenizer, for rewards."""
    from transformers import CLIPConfig, CLIPModel

    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**layers, "image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> Any:
    """A CLIP tokenizer of single bytes."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = {token: i for i, token in enumerate([*letters, *(x + "</w>" for x in letters)])}
    vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"] = 512, 513
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def mode_reward(mixture: GaussianMixture, labels: Tensor, *, norm: float = 2.0) -> Callable[[Tensor], Tensor]:
    """Minus the distance to the first mode of each row's class, (batch,)."""
    first = torch.stack([mixture.means[mixture.labels == c][0] for c in range(mixture.classes)])
    return lambda points: -torch.linalg.vector_norm(points - first[labels], ord=norm, dim=1)


def tune_reward(
    mixture: GaussianMixture, students: PlaneStudent, member: int, reference: Reference, *,
    seed: int, iterations: int = 300, batch: int = 256, anchor: float = 2.3, lr: float = 5e-4,
) -> dict[str, float]:  # fmt: skip
    """The preference stage on one member, without guidance: nearness to one mode, anchored by the sparse distillation loss.

    Returns the gains of the trained and of the held-out reward (L1 norm) at 4 steps as shares of the gap to 0, and coverage.
    """
    student = only(students, member).requires_grad_(True)
    trajectory = TeacherTrajectory(mixture, mixture.schedule, 8, 1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    generator = seeded(seed, 4)

    def measure() -> tuple[float, float, float]:
        points = student_points(student, 0, reference, 4, seed=seed)
        labels = reference.condition.given["class_labels"]
        own, other = (float(mode_reward(mixture, labels, norm=n)(points).mean()) for n in (2.0, 1.0))
        return own, other, reference.score(mixture, points)["coverage"]

    before = measure()
    for _ in range(iterations):
        noise = RowNoise([generator], batch)
        labels = torch.multinomial(mixture.class_weights, batch, replacement=True, generator=generator)
        start = noise.normal(2)
        pairs = milestone_pairs(
            student.x0, trajectory, mixture.condition(labels), noise, start=start, milestones=milestones(8)
        )
        predicted = predictions(student.x0, mixture.schedule, pairs)
        score = mode_reward(mixture, labels)
        preference = RewardLoss(lambda points, prompts, score=score: score(points), margin=0.0)
        pull = preference(predicted, [""] * batch) * pairs.weight**-2
        loss = pull + anchor * pairs.weight * l2(predicted, pairs.target)
        optimizer.zero_grad()
        loss.mean().backward()
        clip_members(student)
        optimizer.step()
        plan.step()
    after = measure()
    return {
        "gain": (after[0] - before[0]) / -before[0],
        "held_out_gain": (after[1] - before[1]) / -before[1],
        "coverage_before": before[2],
        "coverage_loss": 1 - after[2] / before[2],
    }
