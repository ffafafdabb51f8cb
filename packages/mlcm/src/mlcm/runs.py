"""Whole jobs on a pipeline: train, store trajectories, sample, evaluate."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tenfold_shared.cli import Table
from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_pipeline, replace_atomically
from torch import Tensor

from mlcm.card import pipeline_images, report_card, small_pixels
from mlcm.conditioners import PromptCondition, read_prompts
from mlcm.config import TrainConfig
from mlcm.lora import Lora, load_lora
from mlcm.network import Condition, Denoiser
from mlcm.randomness import seeded
from mlcm.rewards import ClipReward, make_reward
from mlcm.schedule import NoiseSchedule, milestones
from mlcm.scheduler import MLCMScheduler
from mlcm.train import STATE, MLCMTrainer, latent_shape
from mlcm.trajectory import TeacherTrajectory, TrajectoryBank

log = logging.getLogger(__name__)


class GuidanceWarning(UserWarning):
    """Guidance on top of a student into which guidance is distilled."""


def load_teacher(model: str, device: torch.device) -> Any:
    """A Stable Diffusion or SDXL pipeline, frozen."""
    pipe = load_pipeline(model)
    if not hasattr(pipe, "unet") or not hasattr(pipe, "text_encoder"):
        raise UserError(f"'{model}' is a {type(pipe).__name__}, expected a Stable Diffusion or SDXL pipeline")
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.requires_grad_(False)
    return pipe.to(device)


def image_decoder(pipe: Any) -> Callable[[Tensor], Tensor]:
    """Latents to images in [0, 1], in float32 (SDXL's VAE overflows in half precision), with gradient checkpointing."""
    vae = pipe.vae.float()
    vae.enable_gradient_checkpointing()
    return lambda z: (vae.decode(z.float() / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def train_pipeline(
    config: TrainConfig, output: Path, *, stages: Sequence[str], resume: bool, device: str
) -> tuple[Path, bool]:
    """Train the stages in turn. Returns the checkpoint, and whether this is the main process."""
    if device not in ("auto", "cpu"):
        raise UserError(
            f"device is '{device}', expected auto or cpu", hint="accelerate launch chooses among accelerators"
        )
    texts = read_prompts(config.prompts)
    checkpoint = output / "checkpoint"
    if resume and not (checkpoint / STATE).exists():
        raise UserError(f"{checkpoint} holds no checkpoint to resume", hint="run without --resume first")
    bank = TrajectoryBank.load(config.trajectories) if config.trajectories else None
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=device == "cpu")
    reward: Any = None
    held_out: Any = None
    if "reward" in stages:
        place = str(accelerator.device)
        reward = make_reward(config.reward, model=config.reward_model, device=place)
        held_out = scorer(config.held_out_reward, place) if config.held_out_reward else None
    pipe = load_teacher(config.model, accelerator.device)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler, prediction_type=config.prediction_type)
    trainer = MLCMTrainer(
        pipe.unet, config.settings(), PromptCondition(pipe, texts, resolution=config.resolution), accelerator,
        schedule=schedule, latents_to_images=image_decoder(pipe) if reward else None, bank=bank,
        shape=_shape(pipe, config), latent_lpips=_latent_lpips(config),
    )  # fmt: skip
    if resume:
        trainer.load(checkpoint)
    for stage in stages:
        if stage == "1":
            trainer.train_stage1(config.stage1_steps, checkpoint=checkpoint)
        elif stage == "2":
            trainer.train_stage2(config.stage2_steps, checkpoint=checkpoint)
        elif stage == "reward":
            trainer.train_reward(reward, config.reward_steps, held_out=held_out, checkpoint=checkpoint)
        else:
            trainer.train_adversarial(config.adversarial_steps, checkpoint=checkpoint)
    return checkpoint, accelerator.is_main_process


def _shape(pipe: Any, config: TrainConfig) -> tuple[int, ...]:
    channels, height, width = latent_shape(pipe.unet)
    if config.resolution is None:
        return channels, height, width
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    if config.resolution % scale:
        raise UserError(f"resolution is {config.resolution}, expected a multiple of {scale}")
    return channels, config.resolution // scale, config.resolution // scale


def _latent_lpips(config: TrainConfig) -> Any:
    if config.loss != "latent_lpips":
        return None
    from mlcm.latent_lpips import LatentLPIPS

    if config.latent_lpips is None:
        raise UserError("loss 'latent_lpips' needs latent_lpips: its weights", hint="or use loss: l2")
    return LatentLPIPS.load(config.latent_lpips)


def compute_bank(config: TrainConfig, *, entries: int, device: str, batch: int = 16) -> TrajectoryBank:
    """Trajectories of a pipeline's guided UNet for prompts drawn at random."""
    texts, place = read_prompts(config.prompts), pick_device(device)
    pipe = load_teacher(config.model, place)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler, prediction_type=config.prediction_type).to(place)
    conditioner, shape = PromptCondition(pipe, texts, resolution=config.resolution), _shape(pipe, config)
    generator = seeded(config.seed, 99)

    def batches() -> Iterator[tuple[Tensor, Tensor, Condition]]:
        from tqdm.auto import tqdm

        for start in tqdm(range(0, entries, batch), desc="trajectories"):
            count = min(batch, entries - start)
            index = torch.randint(0, len(texts), (count,), generator=generator).to(place)
            yield torch.randn(count, *shape, generator=generator).to(place), index, conditioner(index)

    spacing = schedule if config.milestone_spacing == "snr" else None
    trajectory = TeacherTrajectory(
        Denoiser(pipe.unet, schedule).guided, schedule, config.segments, config.guidance_scale, config.solver
    )
    return TrajectoryBank.compute(trajectory, batches(), milestones(config.segments, schedule.last, schedule=spacing))


def scorer(text: str, device: str) -> Any:
    """A reward given as NAME, or as NAME=MODEL with a hub id, folder or checkpoint in place of its own."""
    name, _, model = text.partition("=")
    return make_reward(name, model=model or None, device=device)


def scheduler_settings(lora: Path | None, segments: int | None, **more: Any) -> dict[str, Any]:
    """What the scheduler needs to know: the milestones that the LoRA's checkpoint was trained with, when it says them.

    Raises UserError when `segments` is another number than that of training.
    """
    record = lora / STATE if lora is not None and lora.is_dir() else None
    if record is None or not record.is_file():
        return {"segments": segments or 8, **more}
    try:
        times = [int(t) for t in json.loads(record.read_text(encoding="utf-8"))["milestones"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record} does not say the milestones of training", hint="save the checkpoint again"
        ) from error
    if segments not in (None, len(times) - 1):
        raise UserError(f"segments is {segments}, but {lora} was trained with {len(times) - 1}", hint="leave it out")
    return {"segments": len(times) - 1, "milestones": times, **more}


def check_steps(settings: dict[str, Any], counts: Sequence[int]) -> None:
    """Refuse wrong numbers before anything is loaded."""
    last = settings.get("milestones", [999])[0]
    scheduler = MLCMScheduler(num_train_timesteps=last + 1, **settings)
    for count in counts:
        scheduler.set_timesteps(count)


def attach_lora(pipe: Any, lora: Path) -> Lora:
    """Check a LoRA against the pipeline's UNet, then load it the way users do."""
    found = load_lora(lora)
    found.check(pipe.unet)
    pipe.load_lora_weights({f"unet.{k}": v for k, v in found.tensors.items()})
    return found


def sample_images(
    model: str, prompts: Sequence[str], output: Path, *, steps: int, lora: Path | None, sampler: str, gamma: float,
    segments: int | None, guidance_scale: float, seed: int, device: str,
) -> list[Path]:  # fmt: skip
    """Draw one image per prompt into `output`."""
    scheduler = scheduler_settings(lora, segments, sampler=sampler, gamma=gamma)
    check_steps(scheduler, [steps])
    pipe = load_teacher(model, pick_device(device))
    if lora is not None:
        attach_lora(pipe, lora)
        if guidance_scale > 1:
            warnings.warn(
                f"guidance_scale {guidance_scale} on a student with guidance distilled into it blurs and saturates; use 0",
                GuidanceWarning,
                stacklevel=2,
            )
    pipe.scheduler = MLCMScheduler.from_config(pipe.scheduler.config, **scheduler)
    images = pipeline_images(pipe, prompts, steps, guidance_scale=guidance_scale, seed=seed)
    files = []
    for i, pixels in enumerate(images):
        file = output / f"{i:03d}.png"
        with replace_atomically(file) as partial:
            pipe.numpy_to_pil(pixels.permute(1, 2, 0)[None].numpy())[0].save(partial)
        files.append(file)
    return files


def evaluate_pipeline(
    model: str, prompts: Path, *, lora: Path | None, steps: Sequence[int] | None, segments: int | None, sampler: str,
    guidance_scale: float, teacher_steps: int, clip: str | None, rewards: Sequence[str], fid: bool, seed: int, device: str,
) -> Table:  # fmt: skip
    """The report card of a student; without a LoRA, of the undistilled model in few steps."""
    from diffusers import DDIMScheduler

    settings = scheduler_settings(lora, segments, sampler=sampler)
    counts = list(steps or range(1, settings["segments"] + 1))
    check_steps(settings, counts)
    texts, place = read_prompts(prompts), pick_device(device)
    scorers: dict[str, Any] = {}
    for name in rewards:
        scorers[name.partition("=")[0]] = _in_parts(scorer(name, str(place)), place)
    features: Callable[[Tensor], Tensor] = small_pixels
    if clip:
        judge = ClipReward(clip).to(place)
        features, scorers = _in_parts(judge.image_features, place), {"CLIP score": _in_parts(judge, place), **scorers}
    pipe = load_teacher(model, place)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    # Other seeds than the student's: the same noise would make distances look smaller than they are.
    reference = pipeline_images(pipe, texts, teacher_steps, guidance_scale=guidance_scale, seed=seed + 1_000_000)
    if lora is not None:
        attach_lora(pipe, lora)
    pipe.scheduler = MLCMScheduler.from_config(pipe.scheduler.config, **settings)
    return report_card(
        lambda k: pipeline_images(pipe, texts, k, guidance_scale=0.0, seed=seed), reference,
        steps=counts, features=features, prompts=texts, rewards=scorers, inception=fid,
    )  # fmt: skip


def _in_parts(function: Callable[..., Tensor], device: torch.device, *, batch: int = 16) -> Callable[..., Tensor]:
    """The function on a device, over images and prompts that wait on the CPU."""

    def run(images: Tensor, *prompts: list[str]) -> Tensor:
        parts = range(0, len(images), batch)
        return torch.cat(
            [function(images[i : i + batch].to(device), *(p[i : i + batch] for p in prompts)).cpu() for i in parts]
        )

    return run
