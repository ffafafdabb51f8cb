"""What a distillation is: one validated record, from Python or from a YAML file."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from tenfold_shared.errors import UserError


class MLCMConfig(BaseModel):
    """Settings of a distillation. Wrong values raise pydantic's ValidationError, a ValueError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    segments: int = Field(8, ge=1, description="M, the segments of stage 1")
    skip: int = Field(20, gt=0, description="training indices between neighbours in stage 1")
    guidance_scale: float = Field(8.0, ge=0, allow_inf_nan=False, description="of the teacher; 1 is no guidance")
    stage2: Literal["joint", "sparse", "progressive"] = "joint"
    progressive_segments: tuple[int, ...] = Field(
        (8, 4, 2), description="segments of each part of a progressive stage 2"
    )
    teacher_substeps: int = Field(3, ge=1, description="p, guided teacher steps between milestones in stage 2")
    student_steps: int = Field(4, ge=1, description="q, student steps to the samples that stage 2 noises")
    milestone_weighting: Literal["velocity", "uniform"] = Field(
        "velocity", description="of stage 2's loss over milestones; uniform is the paper's"
    )
    solver: Literal["ddim", "dpm++"] = "ddim"
    milestone_spacing: Literal["uniform", "snr"] = "uniform"
    loss: Literal["l2", "huber", "latent_lpips"] = "l2"
    latent_lpips: Path | None = Field(None, description="weights of the latent LPIPS network")
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample", "flow"] = "auto"
    lora_rank: int = Field(64, ge=1)
    lora_alpha: float | None = Field(None, gt=0, description="the rank when not given")
    lora_targets: tuple[str, ...] | None = Field(None, description="layers to adapt; the authors' list when not given")
    batch_size: int = Field(8, ge=1, description="rows of one process in one forward pass")
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    stage2_learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    gradient_checkpointing: bool = False
    reward_margin: float = Field(16.0, allow_inf_nan=False, description="s_0: rewards above it no longer pull")
    reward_anchor: float = Field(0.1, ge=0, description="weight of the distillation loss beside the reward")
    fake_learning_rate: float = Field(1e-4, gt=0, description="of stage 4's fake score and discriminator")
    adversarial_weight: float = Field(0.1, ge=0)
    checkpoint_every: int = Field(500, ge=1)
    seed: int = 0

    @field_validator("progressive_segments")
    @classmethod
    def _falling(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError("expected one or more numbers of segments, 1 or more each")
        return value


class TrainConfig(MLCMConfig):
    """A whole run of `mlcm train`: the settings, the teacher and the stages' lengths."""

    model: str = Field(description="hub id or folder of a Stable Diffusion or SDXL pipeline")
    prompts: Path = Field(description="text file, one prompt a line")
    stage1_steps: int = Field(12000, ge=0)
    stage2_steps: int = Field(2000, ge=0)
    reward_steps: int = Field(500, ge=0)
    reward: str = Field("clip", description="clip, pickscore, aesthetic, hpsv2, image-reward")
    reward_model: str | None = Field(None, description="hub id or folder of the reward model")
    held_out_reward: str | None = Field(None, description="a second reward model, watched and not trained on")
    adversarial_steps: int = Field(1000, ge=0)
    trajectories: Path | None = Field(
        None, description="folder of mlcm trajectories, in place of solving them in the loop"
    )
    resolution: int | None = Field(None, ge=8, description="pixels; the model's own when not given")
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"

    def settings(self) -> MLCMConfig:
        """The part that the trainer takes."""
        return MLCMConfig(**{name: getattr(self, name) for name in MLCMConfig.model_fields})


def read_config(path: str | Path, **overrides: Any) -> TrainConfig:
    """A YAML file as a TrainConfig; relative paths are taken from the file's folder.

    Raises UserError when it is no YAML mapping, ValidationError (a ValueError) when a value is wrong.
    """
    import yaml

    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no settings", hint="give at least model and prompts")
    config = TrainConfig(**{**raw, **overrides})
    here = {name: path.parent / value for name in ("prompts", "trajectories", "latent_lpips")
            if (value := getattr(config, name)) and not value.is_absolute()}  # fmt: skip
    for name in ("model", "reward_model"):
        if (value := getattr(config, name)) and (path.parent / value).exists():
            here[name] = str(path.parent / value)
    return config.model_copy(update=here)
