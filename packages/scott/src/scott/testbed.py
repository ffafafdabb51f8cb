"""The offline world: the exact mixture in the plane with small students.

The teacher is the mixture's own posterior mean, so what is measured is the distillation alone. Students of several seeds
train side by side in one batched network: member i draws everything from generators seeded with seeds[i] and shares no
number with its neighbours.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import torch
from tenfold_shared.errors import UserError
from torch import Tensor, nn

from scott.adversary import hinge_discriminator, hinge_generator
from scott.consistency import consistency_function, distance, stochastic_target, training_times, update_average
from scott.metrics import prdc, sliced_wasserstein
from scott.mixture import GaussianMixture
from scott.recipes import Recipe
from scott.sample import multistep
from scott.schedule import NoiseSchedule
from scott.solvers import PredictX0

DENOISER = "mixture_denoiser.safetensors"
ITERATIONS, BATCH = 2000, 256
"""Length of a distillation."""
GROUP, BALLS = 4000, 2000
"""Points of one comparison with data, and how many of them coverage and density look at."""


class MemberLinear(nn.Module):
    """Linear layers side by side: (members, batch, inputs) to (members, batch, outputs)."""

    def __init__(self, inputs: int, outputs: int, generators: Sequence[torch.Generator]):
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(
            torch.stack([(torch.rand(inputs, outputs, generator=g) * 2 - 1) * bound for g in generators])
        )
        self.bias = nn.Parameter(torch.zeros(len(generators), 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class MemberMLP(nn.Module):
    """SiLU networks side by side on (point, time, class).

    waves: random Fourier features of the point, none for a network that sees the point alone. scale: the standard
        deviation of their directions, in radians per unit.
    """

    def __init__(
        self,
        hidden: Sequence[int],
        outputs: int,
        *,
        classes: int,
        generators: Sequence[torch.Generator],
        waves: int = 0,
        scale: float = 6.0,
    ):
        super().__init__()
        self.classes = classes
        directions = torch.randn(2, waves, generator=torch.Generator().manual_seed(0)) * scale
        self.register_buffer("directions", directions, persistent=False)
        self.register_buffer("rates", torch.exp(torch.linspace(0, math.log(200), 16)), persistent=False)
        widths = [2 + 2 * waves + 32 + classes, *hidden]
        self.layers = nn.ModuleList(MemberLinear(a, b, generators) for a, b in itertools.pairwise(widths))
        self.head = MemberLinear(widths[-1], outputs, generators)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x: (members, batch, 2); t, label: long (members, batch). Returns (members, batch, outputs)."""
        phase = t[..., None] / 1000 * self.rates
        parts = [x, phase.sin(), phase.cos(), nn.functional.one_hot(label, self.classes).to(x.dtype)]
        if self.directions.numel():
            angle = x @ self.directions
            parts += [angle.sin(), angle.cos()]
        h = torch.cat(parts, -1)
        for layer in self.layers:
            h = nn.functional.silu(layer(h))
        return self.head(h)


class Student(MemberMLP):
    """A denoiser that predicts v. `schedule` turns v into x̂."""

    def __init__(self, mixture: GaussianMixture, members: int):
        generators = [torch.Generator().manual_seed(0) for _ in range(members)]
        super().__init__((128, 128, 128), 2, classes=mixture.classes, generators=generators)
        self.schedule = NoiseSchedule(mixture.schedule.alphas_cumprod, "v_prediction")

    def x0(self, label: Tensor) -> PredictX0:
        """x̂(z, t) for given classes, long (members, batch)."""
        return lambda z, t: self.schedule.predict_x0(self(z, t, label), z, t)

    def f(self, label: Tensor) -> PredictX0:
        """The consistency function for given classes."""
        return consistency_function(self.x0(label))


@functools.cache
def mixture_world() -> GaussianMixture:
    """The mixture of every experiment, on the schedule of Stable Diffusion."""
    return GaussianMixture(NoiseSchedule.stable_diffusion())


def train_denoiser(mixture: GaussianMixture, *, iterations: int = 4000, batch: int = 512, seed: int = 0) -> Student:
    """The network that every student starts from: the teacher's v by regression. About a minute on one core."""
    student, generator = Student(mixture, 1), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        x, label = (value[None] for value in mixture.sample(batch, generator=generator))
        t = torch.randint(0, mixture.schedule.timesteps, label.shape, generator=generator)
        z = mixture.schedule.add_noise(x, torch.randn(x.shape, generator=generator), t)
        alpha, sigma = (value.float()[..., None] for value in (mixture.schedule.alpha(t), mixture.schedule.sigma(t)))
        wanted = (alpha * z - mixture.x0(z, t, label)) / sigma
        loss = (student(z, t, label) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return student


def build(folder: Path) -> Path:
    """Train the shipped denoiser anew and write it into `folder`; returns the file."""
    from safetensors.torch import save_file
    from tenfold_shared.hub import replace_atomically

    student = train_denoiser(mixture_world())
    with replace_atomically(folder / DENOISER) as partial:
        save_file({name: value.half() for name, value in student.state_dict().items()}, partial)
    return folder / DENOISER


def pretrained(members: int) -> Student:
    """The shipped denoiser, once per member."""
    from safetensors.torch import load_file

    student = Student(mixture_world(), members)
    weights = load_file(str(files("scott") / "data" / DENOISER))
    student.load_state_dict({name: value.float().repeat(members, 1, 1) for name, value in weights.items()})
    return student


def distil(
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    start: Student | None = None,
    iterations: int = ITERATIONS,
    batch: int = BATCH,
    skip: int = 24,
    lr: float = 5e-4,
    adv_weight: float = 0.04,
    disc_lr: float = 1e-3,
    scale: float = 6.0,
    progress: Callable[[int], None] | None = None,
) -> Student:
    """Distil the exact mixture into one student per seed; what is returned is the average that the targets come from.

    start: where the students start from, the shipped denoiser when not given. lr, disc_lr: of student and discriminator,
    falling to 0 along a cosine. adv_weight: λ_adv. progress: called with every iteration.

    Raises UserError when a loss is not finite.
    """
    mixture, members = mixture_world(), len(seeds)
    schedule, solver = mixture.schedule, recipe.make_solver(mixture.schedule)
    student, average = start or pretrained(members), Student(mixture, members)
    average.load_state_dict(student.state_dict())
    data = [torch.Generator().manual_seed(1000 * seed + 1) for seed in seeds]
    noise = [torch.Generator().manual_seed(1000 * seed + 2) for seed in seeds]
    judge = MemberMLP(
        (96, 96), 1, classes=mixture.classes, waves=32, scale=scale,
        generators=[torch.Generator().manual_seed(1000 * seed + 3) for seed in seeds],
    )  # fmt: skip
    optimizers = [torch.optim.Adam(student.parameters(), lr=lr, fused=True)]
    if recipe.gan:
        optimizers.append(torch.optim.Adam(judge.parameters(), lr=disc_lr, betas=(0.0, 0.99), fused=True))
    plans = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations) for optimizer in optimizers]

    for iteration in range(iterations):
        drawn = [
            (*mixture.sample(batch, generator=g), *training_times(batch, timesteps=1000, skip=skip, generator=g))
            for g in data
        ]
        x, label, t_n, t_m = (torch.stack(column) for column in zip(*drawn, strict=True))
        z = schedule.add_noise(x, torch.stack([torch.randn(batch, 2, generator=g) for g in data]), t_n)
        teacher = functools.partial(_teacher, mixture, label)
        target = stochastic_target(
            solver, z, t_n=t_n, t_m=t_m, teacher=teacher, target=average.f(label), generator=noise
        )
        jump = student.f(label)(z, t_n)
        score = None
        if recipe.gan:
            judge.requires_grad_(False)
            score = judge(jump, t_n, label)[..., 0]
            judge.requires_grad_(True)
        # Means over the batch, sums over members: every member has the gradient it would have alone.
        loss = student_loss(jump, target, score, adv_weight=adv_weight).mean(1).sum()
        if not bool(torch.isfinite(loss.detach())):
            raise UserError(f"the loss of '{recipe.name}' is {float(loss.detach())} at iteration {iteration}")
        optimizers[0].zero_grad()
        loss.backward()
        _clip(student, 1.0)
        optimizers[0].step()
        if recipe.gan:
            both = torch.cat([x, jump.detach()], 1)
            real, fake = judge(both, t_n.repeat(1, 2), label.repeat(1, 2))[..., 0].chunk(2, 1)
            verdict = hinge_discriminator(real, fake).mean(1).sum()
            optimizers[1].zero_grad()
            verdict.backward()
            optimizers[1].step()
        for plan in plans:
            plan.step()
        update_average(list(average.parameters()), [p.detach() for p in student.parameters()], 0.95)
        if progress:
            progress(iteration)
    return average.requires_grad_(False)


def student_loss(jump: Tensor, target: Tensor, score: Tensor | None = None, *, adv_weight: float = 0.0) -> Tensor:
    """‖f_θ − f_θ⁻‖² − λ_adv D(f_θ) per sample, the norm being a sum over the two coordinates, not their mean.

    jump, target: (members, batch, 2); score: (members, batch), none without a discriminator. Returns (members, batch).
    """
    loss = jump.shape[-1] * distance(jump, target, dims=2)
    return loss if score is None else loss + adv_weight * hinge_generator(score)


def _teacher(mixture: GaussianMixture, label: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return mixture.x0(z, t, label)


def _clip(model: nn.Module, limit: float) -> None:
    """Clip the gradient's norm of each member on its own."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = sum(g.square().flatten(1).sum(1) for g in gradients).sqrt()
    for g in gradients:
        g.mul_((limit / norm).clamp(max=1)[:, None, None])


def samples(student: Student, seeds: Sequence[int], *, steps: int, n: int = GROUP) -> Tensor:
    """Samples (members, n, 2) of the students in `steps` calls each."""
    mixture = mixture_world()
    generators = [torch.Generator().manual_seed(1000 * seed + 4) for seed in seeds]
    label = torch.stack([mixture.sample(n, generator=g)[1] for g in generators])
    noise = torch.stack([torch.randn(n, 2, generator=g) for g in generators])
    return multistep(
        student.f(label), noise, steps=steps, schedule=mixture.schedule, batch_dims=2, generator=generators
    )


def measure(x: Tensor, *, seed: int) -> dict[str, float]:
    """Sliced Wasserstein distance of 4000 points to 4000 fresh ones of the data, coverage and density at 2000 points and
    k = 5, share of strays.

    x: (n, 2). With more than 4000 points the first three are means over groups of 4000, each against data of its own: how
    often a mode comes up moves the distance between two draws of the data from 0.02 to 0.07.
    """
    mixture, generator = mixture_world(), torch.Generator().manual_seed(1000 * seed + 5)
    found: list[dict[str, float]] = []
    for group in x.split(GROUP):
        real, _ = mixture.sample(len(group), generator=generator)
        balls = prdc(real[:BALLS], group[:BALLS])
        found.append(
            {"sw2": sliced_wasserstein(real, group), **{name: balls[name] for name in ("coverage", "density")}}
        )
    return {name: statistics.fmean(row[name] for row in found) for name in found[0]} | {"far": mixture.far(x)}
