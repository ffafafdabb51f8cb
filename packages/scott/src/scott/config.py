"""Everything a distillation run depends on, checked before anything is loaded."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tenfold_shared.errors import UserError


class SCottConfig(BaseModel):
    """Settings of `SCottTrainer`; the defaults are those reported for Stable Diffusion 1.5 (2403.01505).

    Times and `skip` are in steps of the teacher's schedule (1000 as a rule).

    Raises a ValueError (pydantic's or UserError) in one line for unknown keys, wrong types and impossible combinations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(default=None, description="teacher: hub id or folder of a diffusers pipeline")
    dataset: str | None = Field(default=None, description="folder made by `scott prepare-latents`")

    solver: Literal["ode", "ddim-eta", "er-sde"] = "er-sde"
    noise: str = Field(default="sde5", description="noise function of er-sde")
    eta: float = Field(default=0.0, description="η of ddim-eta")
    skip: int = Field(default=24, ge=1, description="t_n − t_m")
    substeps: int = Field(default=3, ge=1, description="solver steps h between t_n and t_m")
    noise_below: int | None = Field(default=None, description="use the solver's noise only below this time step")
    noise_ramp: Literal["step", "linear", "cosine"] = "step"
    draws: int = Field(default=1, ge=1, description="solver paths averaged per sample")
    grid: int | None = Field(
        default=50, ge=1, description="t_n on LCMScheduler's grid of so many times; null for any time"
    )

    loss: Literal["l2", "huber"] = "huber"
    huber_c: float = Field(default=1e-3, gt=0)
    weighting: Literal["uniform", "min-snr"] = "uniform"
    ema: float = Field(default=0.95, ge=0, lt=1)
    guidance: float | tuple[float, float] = Field(
        default=7.5, description="ω, or the range it is drawn from (student: full)"
    )

    adv_weight: float = Field(default=0.4, ge=0, description="λ_adv; 0 leaves the discriminator out")
    disc_warmup: int = Field(
        default=0, ge=0, description="first iterations in which the discriminator alone is trained"
    )
    disc_layers: Literal["all", "attention"] = "all"
    disc_rank: int = Field(default=48, ge=1)
    r1: float = Field(default=0.0, ge=0, description="weight of the gradient penalty on data")
    renoise: bool = Field(default=False, description="judge data and predictions after noising both to a random time")

    student: Literal["lora", "full"] = "lora"
    rank: int = Field(default=64, ge=1, description="rank of the student's LoRA")
    lr: float = Field(default=8e-6, gt=0)
    disc_lr: float = Field(default=2e-5, gt=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = Field(default=1.0, gt=0)

    data: Literal["latents", "teacher"] = Field(
        default="latents", description="teacher: samples of the teacher take the data's place"
    )
    teacher_steps: int = Field(default=50, ge=1)
    teacher_samples: int = Field(default=1024, ge=1)

    batch: int = Field(default=40, ge=1, description="over all processes")
    micro_batch: int | None = Field(default=None, ge=1, description="samples of one forward pass on one process")
    iterations: int = Field(default=40_000, ge=1)
    checkpoint_every: int = Field(default=1000, ge=1)
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0)

    def model_post_init(self, context: Any) -> None:
        if self.substeps > self.skip:
            raise UserError(
                f"{self.substeps} sub-steps in a skip of {self.skip} visit the same time twice",
                hint="lower substeps or raise skip",
            )
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"eta is {self.eta}, expected 0 (no noise) to 1 (full noise)")
        if self.noise_below is not None and self.noise_below < 1:
            raise UserError(f"noise_below is {self.noise_below}, expected 1 or more")
        low, high = self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)
        if not 0 <= low <= high:
            raise UserError(f"guidance is {self.guidance}, expected ω of 0 or more, or a range of it")
        if isinstance(self.guidance, tuple) and self.student == "lora":
            raise UserError(
                f"a range of guidance {self.guidance} for a LoRA student, which has no ω input",
                hint="give one number, or student: full",
            )

    @classmethod
    def load(cls, path: str | Path) -> "SCottConfig":
        """Read a YAML or JSON file. Raises UserError in one line when it is not a valid configuration."""
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} is neither YAML nor JSON", hint="see `scott train --help` for an example"
            ) from error
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no settings", hint="expected lines such as `substeps: 3`")
        return cls.of(content)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "SCottConfig":
        """From a dictionary. Raises UserError in one line."""
        try:
            return cls(**settings)
        except ValidationError as error:
            # A combination of settings belongs to no key, and its message names what was given.
            lines = [
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}, given {e['input']!r}"
                if e["loc"]
                else e["msg"].removeprefix("Value error, ")
                for e in error.errors()
            ]
            raise UserError("; ".join(lines)) from error
