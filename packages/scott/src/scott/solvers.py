"""Every first-order solver of the reverse process is a choice of one number r per step.

    z_s = α_s [ r z_t / α_t + (1 − r) x̂(z_t, t) + √(λ_s² − r² λ_t²) ξ ],   ξ ~ N(0, I),   0 ≤ r ≤ λ_s / λ_t

For exact x̂ all of them keep the marginals of the forward process as the steps get small; they differ in how much of the
noise is fresh. r = λ_s/λ_t adds none: the ODE, DDIM with η = 0. r = (λ_s/λ_t)² is the Gaussian posterior q(z_s | z_t, x̂):
DDPM, DDIM with η = 1, the full reverse SDE. r = φ(λ_s)/φ(λ_t) is the extended reverse SDE with the noise function φ, whose
"SDE 5" SCott distils (2403.01505). r = 0 forgets z_t: the sampler of consistency models.

The η of DDIM scales the noise of one step; it is not the η of the continuous extended reverse SDE, whose noise function is
φ(λ) = λ^(1 + η²).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

from scott.schedule import NoiseSchedule, like

PredictX0: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""x̂(z, t): (*batch, ...), (*batch) to (*batch, ...)."""

Generator: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""Where noise comes from; a sequence holds one generator per entry of the first dimension."""

SOLVERS = ("ode", "ddim-eta", "er-sde", "renoise", "gamma", "custom")
SLACK = 1e-6
"""How far r may pass λ_s/λ_t, or φ(λ)/λ may fall, and still be rounding."""


@dataclass(frozen=True)
class NoiseFunction:
    """φ of the extended reverse SDE: an increasing function of λ for which φ(λ)/λ does not fall.

    name: for messages. phi: float64 tensor to float64 tensor, elementwise; defined at 0.
    """

    name: str
    phi: Callable[[Tensor], Tensor]

    @classmethod
    def named(cls, name: str) -> "NoiseFunction":
        """One of NOISE_FUNCTIONS. Raises UserError for another name."""
        if name not in NOISE_FUNCTIONS:
            raise UserError(f"noise function '{name}' is unknown", hint=f"expected {', '.join(NOISE_FUNCTIONS)}")
        return cls(name, NOISE_FUNCTIONS[name])

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise UserError when φ asks for negative noise somewhere on the schedule."""
        lam = schedule.lam(torch.arange(schedule.timesteps))
        phi = self.phi(lam)
        if not bool(torch.isfinite(phi).all()) or not bool((phi > 0).all()) or not bool((phi.diff() > 0).all()):
            raise UserError(f"noise function '{self.name}' is not positive and increasing on this schedule")
        ratio = phi / lam
        falls = (ratio.diff() < -SLACK * ratio[:-1]).nonzero()
        if len(falls):
            where = float(lam[int(falls[0])])
            raise UserError(
                f"noise function '{self.name}' has falling φ(λ)/λ at λ = {where:.4g}, which asks for negative noise",
                hint="φ must grow at least as fast as λ",
            )


NOISE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ode": lambda lam: lam,
    "sde": lambda lam: lam**2,
    "power1.5": lambda lam: lam**1.5,
    "power2.5": lambda lam: lam**2.5,
    "log": lambda lam: lam**0.9 * torch.log10(1 + 100 * lam**1.5),
    "sde5": lambda lam: lam * (torch.exp(lam**0.3) + 10),
}
"""φ(λ) by name; `ode` gives no noise, `sde` the full reverse SDE, `sde5` is what SCott uses."""


@dataclass(frozen=True)
class NoiseStrength:
    """How much of a solver's noise is used at time t: 1 below some time, 0 above it, or a ramp down to it.

    below: time step where the strength reaches 0. ramp: `step`, `linear` or `cosine`.

    Raises UserError for an unknown ramp or below < 1.
    """

    below: int
    ramp: str = "step"

    def __post_init__(self) -> None:
        if self.ramp not in ("step", "linear", "cosine"):
            raise UserError(f"ramp '{self.ramp}' is unknown", hint="expected step, linear or cosine")
        if self.below < 1:
            raise UserError(f"noise below time step {self.below}, expected 1 or more")

    def __call__(self, t: Tensor) -> Tensor:
        """Strength in [0, 1], float64, in the shape of t."""
        part = (t.double() / self.below).clamp(max=1)
        if self.ramp == "step":
            return (part < 1).double()
        return 1 - part if self.ramp == "linear" else (1 + torch.cos(math.pi * part)) / 2


class SDESolver:
    """Steps backwards in time with controlled noise, batched over samples that are each at a time of their own.

    alphas_cumprod: ᾱ, shape (timesteps,), or a NoiseSchedule.
    kind: `ode`, `ddim-eta` (needs eta), `er-sde` (needs noise), `renoise` (r = 0), `gamma` (needs eta: the γ of trajectory
        consistency sampling) or `custom` (needs r).
    noise: a name in NOISE_FUNCTIONS, or φ itself. r: function of (t, s), both long (*batch), giving r (*batch).
    strength: how much of the noise is used at time t; r becomes r_ode^(1 − strength) r^strength.
    substeps: steps that `solve` takes, uniform in time.

    Raises UserError when η is outside [0, 1], φ is not a noise function, substeps < 1, or the kind is unknown.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor | NoiseSchedule,
        kind: str = "er-sde",
        *,
        noise: str | Callable[[Tensor], Tensor] | NoiseFunction = "sde5",
        eta: float = 0.0,
        r: Callable[[Tensor, Tensor], Tensor] | None = None,
        strength: Callable[[Tensor], Tensor] | None = None,
        substeps: int = 1,
    ):
        self.schedule = alphas_cumprod if isinstance(alphas_cumprod, NoiseSchedule) else NoiseSchedule(alphas_cumprod)
        if kind not in SOLVERS:
            raise UserError(f"solver '{kind}' is unknown", hint=f"expected {', '.join(SOLVERS)}")
        if not 0.0 <= eta <= 1.0:
            raise UserError(f"eta is {eta}, expected 0 (no noise) to 1 (full noise)")
        if substeps < 1:
            raise UserError(f"substeps is {substeps}, expected 1 or more")
        if (kind == "custom") != (r is not None):
            raise UserError("the solver 'custom' and the argument r belong together")
        if isinstance(noise, str):
            noise = NoiseFunction.named(noise)
        elif not isinstance(noise, NoiseFunction):
            noise = NoiseFunction("custom", noise)
        if kind == "er-sde":
            noise.check(self.schedule)
        self.kind, self.noise, self.eta, self.substeps = kind, noise, eta, substeps
        self._custom, self._strength = r, strength
        self._phi: dict[torch.device, Tensor] = {}

    def coefficient(self, t: Tensor, s: Tensor) -> Tensor:
        """r of the step from t to s, float64 (*batch). t, s: long (*batch), s ≤ t, s = −1 for clean data.

        Raises UserError when a custom r is outside [0, λ_s/λ_t], or a noise strength outside [0, 1].
        """
        lam_t, lam_s = self.schedule.lam(t), self.schedule.lam(s)
        ode = lam_s / lam_t
        if self.kind == "ode":
            return ode
        r = self._unscaled(t, s, lam_t, lam_s, ode)
        if self._strength is not None:
            k = self._strength(t)
            if bool(((k < 0) | (k > 1) | torch.isnan(k)).any()):
                raise UserError(f"noise strength of {float(k.min()):.4g} to {float(k.max()):.4g}, expected 0 to 1")
            r = ode ** (1 - k) * r**k
        return r

    def _unscaled(self, t: Tensor, s: Tensor, lam_t: Tensor, lam_s: Tensor, ode: Tensor) -> Tensor:
        if self.kind == "er-sde":
            phi = self._phi_table(t.device)
            return phi[s + 1] / phi[t + 1]
        if self.kind == "renoise":
            return torch.zeros_like(ode)
        if self.kind == "gamma":
            # Down to (1 − γ) s without noise, back up to s with fresh noise; the middle time is where r is decided.
            middle = torch.where(s >= 0, ((1 - self.eta) * s.double()).floor().long(), s)
            return self.schedule.lam(middle) / lam_t
        if self.kind == "ddim-eta":
            bar_t, bar_s = self.schedule.alpha(t) ** 2, self.schedule.alpha(s) ** 2
            fresh = self.eta**2 * (1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s)
            return (1 - bar_s - fresh).clamp(min=0).sqrt() / bar_s.sqrt() / lam_t
        r = self._custom(t, s).to(ode)  # type: ignore[misc]
        bad = ((r < 0) | (r > ode * (1 + SLACK)) | ~torch.isfinite(r)).flatten()
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise UserError(
                f"custom r = {float(r.flatten()[i]):.6g} for the step from t = {int(t.flatten()[i])} to "
                f"s = {int(s.flatten()[i])}, expected 0 to λ_s/λ_t = {float(ode.flatten()[i]):.6g}"
            )
        return r

    def _phi_table(self, device: torch.device) -> Tensor:
        """φ(λ_t) for t = −1, 0, 1, ..., so that a step looks two numbers up."""
        if device not in self._phi:
            self._phi[device] = self.noise.phi(
                self.schedule.lam(torch.arange(-1, self.schedule.timesteps, device=device))
            )
        return self._phi[device]

    def fresh_noise(self, t: Tensor, s: Tensor) -> Tensor:
        """Standard deviation of the noise that the step from t to s adds, float64 (*batch)."""
        r = self.coefficient(t, s)
        square = self.schedule.lam(s) ** 2 - (r * self.schedule.lam(t)) ** 2
        return self.schedule.alpha(s) * square.clamp(min=0).sqrt()

    def step(
        self,
        z: Tensor,
        t: Tensor,
        s: Tensor,
        x0: Tensor,
        *,
        noise: Tensor | None = None,
        generator: Generator = None,
    ) -> Tensor:
        """One step from t to s.

        z, x0, noise: (*batch, ...); t, s: long (*batch). noise: ξ, drawn from `generator` when not given.
        The arithmetic is float32 or finer whatever the precision of z.
        """
        dtype = z.dtype
        work = torch.promote_types(dtype, torch.float32)
        z, x0 = z.to(work), x0.to(work)
        r = self.coefficient(t, s)
        alpha_s, lam_t, lam_s = self.schedule.alpha(s), self.schedule.lam(t), self.schedule.lam(s)
        result = like(alpha_s * r / self.schedule.alpha(t), z) * z + like(alpha_s * (1 - r), z) * x0
        if self.kind != "ode":
            if noise is None:
                noise = draw(z.shape, z, generator)
            scale = alpha_s * (lam_s**2 - (r * lam_t) ** 2).clamp(min=0).sqrt()
            result = result + like(scale, z) * noise.to(work)
        return result.to(dtype)

    def subtimes(self, t_n: Tensor, t_m: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The sub-grid of `solve`: pairs of (t, s), `substeps` of them, from t_n to t_m."""
        before = t_n
        for i in range(1, self.substeps + 1):
            after = t_n + ((t_m - t_n).double() * (i / self.substeps)).round().long()
            yield before, after
            before = after

    @torch.no_grad()
    def solve(
        self,
        z: Tensor,
        t_n: Tensor,
        t_m: Tensor,
        predict_x0: PredictX0,
        *,
        generator: Generator = None,
    ) -> Tensor:
        """From z at t_n to t_m in `substeps` steps, each with noise of its own (2403.01505, the SDE solver Ψ).

        z: (*batch, ...); t_n, t_m: long (*batch), t_m ≤ t_n. predict_x0: x̂(z, t) of the teacher, guidance included.

        Raises UserError when t_m is above t_n.
        """
        if bool((t_m > t_n).any()):
            raise UserError("t_m is above t_n; the solver goes backwards in time", hint="swap the two")
        for t, s in self.subtimes(t_n, t_m):
            z = self.step(z, t, s, predict_x0(z, t), generator=generator)
        return z


def draw(shape: torch.Size, like_: Tensor, generator: Generator = None) -> Tensor:
    """Standard normal noise on the device of `like_`, drawn on the generators' own device."""
    if isinstance(generator, Sequence):
        return torch.stack([draw(shape[1:], like_, one) for one in generator])
    device = generator.device if generator is not None else like_.device
    work = torch.promote_types(like_.dtype, torch.float32)
    return torch.randn(shape, generator=generator, device=device, dtype=work).to(like_.device)
