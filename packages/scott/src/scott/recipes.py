"""The experiments that stand beside each other in every table: which noise, how many sub-steps, discriminator or not."""

from dataclasses import dataclass, replace

from scott.schedule import NoiseSchedule
from scott.solvers import NoiseStrength, SDESolver


@dataclass(frozen=True)
class Recipe:
    """One way to distil: a solver, its sub-steps, and whether there is a discriminator."""

    name: str
    solver: str = "er-sde"
    noise: str = "sde5"
    eta: float = 0.0
    substeps: int = 3
    noise_below: int | None = None
    gan: bool = False

    def with_gan(self, name: str) -> "Recipe":
        return replace(self, name=name, gan=True)

    def make_solver(self, schedule: NoiseSchedule) -> SDESolver:
        strength = NoiseStrength(self.noise_below) if self.noise_below else None
        return SDESolver(
            schedule, self.solver, noise=self.noise, eta=self.eta, strength=strength, substeps=self.substeps
        )


_ODE = Recipe("ODE", "ode")
_DDIM = Recipe("DDIM eta 0.3", "ddim-eta", eta=0.3)
_SDE = Recipe("SDE 5")
_FULL = Recipe("full SDE", "er-sde", "sde")
_LATE = Recipe("late noise", noise_below=400)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("LCM", "ode", substeps=1),
        _ODE, _DDIM, _SDE, _FULL, _LATE,
        _ODE.with_gan("ODE + GAN"), _DDIM.with_gan("DDIM eta 0.3 + GAN"), _SDE.with_gan("SCott"),
        _FULL.with_gan("full SDE + GAN"), _LATE.with_gan("late noise + GAN"),
    )
}  # fmt: skip
"""The experiments by name. LCM is the deterministic baseline; SCott is SDE 5 with the discriminator."""
