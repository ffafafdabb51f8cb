"""Training: one loop for the four stages, on accelerate.

The student is a LoRA inside the teacher's own network, so teacher calls run with the adapters off and cost no second copy.
Random numbers depend on (seed, stage, step, row) alone: a resumed run, and any number of processes, see the same ones.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor, nn

from mlcm.adversary import Adversary
from mlcm.conditioners import Conditioner
from mlcm.config import MLCMConfig
from mlcm.distill import (
    Distance,
    Pairs,
    consistency_loss,
    from_bank,
    milestone_pairs,
    predictions,
    segment_pairs,
    student_sample,
)
from mlcm.losses import make_distance
from mlcm.network import SDXL_TARGETS, Condition, Denoiser, Teacher, adapters_off, add_lora, trainable
from mlcm.randomness import RowNoise, initialised_from, seeded
from mlcm.rewards import RewardLoss, RewardModel
from mlcm.schedule import NoiseSchedule, milestones
from mlcm.trajectory import TeacherTrajectory, TrajectoryBank

log = logging.getLogger(__name__)
STAGES = ("stage1", "stage2", "reward", "adversarial")
STATE = "trainer.json"


class TrainingDivergedError(UserError, FloatingPointError):
    """The loss is not a finite number."""


class MLCMTrainer:
    """Distils a diffusion model into a student for 1 to M steps, without data.

    teacher: a diffusers UNet (or another network called as network(z, t, **arguments)), which gets the LoRA; or a function
    (z, t, condition, guidance scale) to x̂ together with `student`, a network that is trained whole.
    conditioner: the prompts. schedule: of the teacher. shape: of one latent; the UNet's own when not given.
    latents_to_images: for rewards, latents (batch, ...) to images (batch, 3, height, width) in [0, 1].
    bank: stored trajectories in place of solving them in the loop.
    """

    def __init__(
        self,
        teacher: nn.Module | Teacher,
        config: MLCMConfig,
        conditioner: Conditioner,
        accelerator: Accelerator | None = None,
        *,
        schedule: NoiseSchedule,
        shape: Sequence[int] | None = None,
        student: nn.Module | None = None,
        latents_to_images: Callable[[Tensor], Tensor] | None = None,
        bank: TrajectoryBank | None = None,
        latent_lpips: nn.Module | None = None,
    ):
        self.config, self.conditioner = config, conditioner
        self.accelerator = accelerator or Accelerator()
        self.schedule = schedule.to(self.accelerator.device)
        spacing = self.schedule if config.milestone_spacing == "snr" else None
        self.milestones = milestones(config.segments, self.schedule.last, schedule=spacing)
        if config.skip > self.schedule.last:
            raise UserError(f"skip is {config.skip}, expected at most {self.schedule.last}")
        if config.stage2 == "joint" and config.batch_size % 2:
            raise UserError(f"batch_size is {config.batch_size}, expected an even number for stage2 'joint'")
        if student is None:
            if not isinstance(teacher, nn.Module):
                raise UserError("a teacher that is a function needs student=, the network to train")
            if not trainable_lora(teacher):
                targets = config.lora_targets or SDXL_TARGETS
                with initialised_from(config.seed):
                    add_lora(teacher, config.lora_rank, alpha=config.lora_alpha, targets=targets)
            if config.gradient_checkpointing:
                teacher.enable_gradient_checkpointing()
            student = teacher
        self.shape = tuple(shape) if shape is not None else latent_shape(student)
        self.network = student
        self.latents_to_images, self.bank = latents_to_images, bank
        features = latent_lpips.to(self.accelerator.device) if latent_lpips is not None else None
        self.distance: Distance = make_distance(config.loss, features=features)
        student.to(self.accelerator.device)
        self.wrapped = self.accelerator.prepare(student)
        self._denoiser = Denoiser(student, self.schedule)
        self._student = Denoiser(self.wrapped, self.schedule)
        self.trajectory = TeacherTrajectory(
            self._frozen if teacher is student else teacher,
            self.schedule,
            config.segments,
            config.guidance_scale,
            config.solver,
        )
        self.progress = dict.fromkeys(STAGES, 0)
        self.losses: list[float] = []
        """Loss of every step of this process's run."""
        self.stage = ""
        self.optimizer: Any = None
        self._optimizer_state: dict[str, Any] | None = None
        self.adversary: Adversary | None = None
        if bank is not None:
            self._check_bank(bank)

    def _check_bank(self, bank: TrajectoryBank) -> None:
        if bank.states.shape[2:] != self.shape:
            raise UserError(f"the bank's latents are {tuple(bank.states.shape[2:])}, the student's {self.shape}")
        if list(bank.milestones) != self.milestones:
            raise UserError(
                f"the bank's milestones are {list(bank.milestones)}, training's {self.milestones}",
                hint="compute it with the same segments and schedule",
            )
        if int(bank.prompts.max()) >= len(self.conditioner):
            raise UserError(
                f"the bank names prompt {int(bank.prompts.max())}, but there are {len(self.conditioner)}",
                hint="train with the prompts file that it was computed for",
            )

    def _frozen(self, z: Tensor, t: Tensor, condition: Condition, scale: float | Tensor) -> Tensor:
        with adapters_off(self.network):
            return self._denoiser.guided(z, t, condition, scale)

    # The stages.

    def train_stage1(self, steps: int, *, checkpoint: str | Path | None = None) -> None:
        """Multistep consistency distillation up to `steps` optimiser steps in all. checkpoint: folder to save into."""
        self._train("stage1", steps, self.config.learning_rate, checkpoint, self._distil("segments"))

    def train_stage2(self, steps: int, *, checkpoint: str | Path | None = None) -> None:
        """The second stage that the config names: joint, sparse or progressive."""
        self._train(
            "stage2", steps, self.config.stage2_learning_rate, checkpoint, self._distil(self.config.stage2, steps)
        )

    def train_reward(
        self,
        reward: RewardModel,
        steps: int,
        *,
        held_out: RewardModel | None = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        """Raise a reward of the one-jump prediction, held near the teacher by `reward_anchor`.

        reward: see `RewardModel`. held_out: watched only; a warning comes when it falls while the trained one rises.
        """
        if self.latents_to_images is None:
            raise UserError("rewards need latents_to_images=", hint="the pipeline's decoder, or the identity")
        loss = RewardLoss(
            reward, margin=self.config.reward_margin, latents_to_images=self.latents_to_images, held_out=held_out
        )

        def rows(noise: "Draws", step: int) -> Tensor:
            pairs = self._milestone_pairs(noise)
            predicted = predictions(self._student.x0, self.schedule, pairs)
            anchor = self.config.reward_anchor * pairs.weight * self.distance(predicted, pairs.target)
            # Content is chosen at high noise; with velocity weights the clean end, where only detail is left, is pulled least.
            return loss(predicted, noise.prompts) * pairs.weight**-2 + anchor

        self._train("reward", steps, self.config.stage2_learning_rate, checkpoint, rows)

    def train_adversarial(self, steps: int, *, checkpoint: str | Path | None = None) -> None:
        """Stage 4: distribution matching against a fake score, and a discriminator; both begin as the teacher."""
        if self.adversary is None:
            self.adversary = self._make_adversary()
        adversary = self.adversary

        def rows(noise: "Draws", step: int) -> Tensor:
            pairs = self._milestone_pairs(noise)
            predicted = predictions(self._student.x0, self.schedule, pairs)
            real = student_sample(
                self._denoiser.x0, self.schedule, pairs.condition, noise.rows,
                start=noise.rows.normal(*self.shape), steps=self.config.student_steps,
            )  # fmt: skip
            adversary.update(predicted.detach(), real, pairs.condition, noise.rows)
            pull = adversary.pull(predicted, pairs.condition, noise.rows)
            return pairs.weight * self.distance(predicted, pairs.target) + self.config.adversarial_weight * pull

        self._train("adversarial", steps, self.config.stage2_learning_rate, checkpoint, rows)

    def _make_adversary(self) -> Adversary:
        with initialised_from(self.config.seed):
            return Adversary(
                self.network, self.schedule, self.accelerator,
                lr=self.config.fake_learning_rate, guidance_scale=self.config.guidance_scale, teacher=self.trajectory.teacher,
            )  # fmt: skip

    def _distil(self, kind: str, steps: int = 0) -> "Callable[[Draws, int], Tensor]":
        def rows(noise: "Draws", step: int) -> Tensor:
            if kind == "joint":
                # Alternate rows of the global batch, so that the split does not depend on the number of processes.
                first, second = noise.part(0), noise.part(1)
                pairs = Pairs.cat([self._segment_pairs(first, self.milestones), self._milestone_pairs(second)])
            elif kind == "sparse":
                pairs = self._milestone_pairs(noise)
            elif kind == "progressive":
                plan = self.config.progressive_segments
                now = plan[min(step * len(plan) // steps, len(plan) - 1)]
                pairs = self._segment_pairs(noise, milestones(now, self.schedule.last))
            else:
                pairs = self._segment_pairs(noise, self.milestones)
            noise.t = pairs.t
            return consistency_loss(self._student.x0, self.schedule, pairs, self.distance)

        return rows

    def _segment_pairs(self, noise: "Draws", times: Sequence[int]) -> Pairs:
        start: Any = noise.rows.normal(*self.shape)
        condition = noise.condition
        if self.bank is not None:
            entries = noise.rows.integers(0, len(self.bank) - 1)
            condition = self.conditioner(self.bank.prompts[entries.cpu()].to(entries.device))
            start = from_bank(self.bank, entries)
        return segment_pairs(
            self._denoiser.x0, self.trajectory, condition, noise.rows,
            start=start, milestones=times, skip=self.config.skip,
        )  # fmt: skip

    def _milestone_pairs(self, noise: "Draws") -> Pairs:
        return milestone_pairs(
            self._denoiser.x0, self.trajectory, noise.condition, noise.rows,
            start=noise.rows.normal(*self.shape), milestones=self.milestones,
            student_steps=self.config.student_steps, substeps=self.config.teacher_substeps,
            weighting=self.config.milestone_weighting,
        )  # fmt: skip

    # The loop.

    def _train(
        self, stage: str, steps: int, lr: float, checkpoint: str | Path | None, rows: "Callable[[Draws, int], Tensor]"
    ) -> None:
        from tqdm.auto import tqdm

        if steps < 0:
            raise UserError(f"steps is {steps}, expected 0 or more")
        if self.progress[stage] >= steps:
            return
        self._enter(stage, lr)
        accelerator, accumulation = self.accelerator, self.config.gradient_accumulation
        parameters = list(trainable(self.network).values())
        bar = tqdm(
            range(self.progress[stage], steps), desc=stage, initial=self.progress[stage], total=steps,
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        for step in bar:
            self._set_lr(lr, step, steps)
            total = 0.0
            for micro in range(accumulation):
                noise = Draws(self, STAGES.index(stage), step * accumulation + micro)
                last = micro == accumulation - 1
                with _sync(accelerator, self.wrapped, last):
                    loss = rows(noise, step)
                    self._check(loss, noise, stage, step)
                    accelerator.backward(loss.mean() / accumulation)
                total += float(loss.detach().mean()) / accumulation
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress[stage] = step + 1
            self.losses.append(total)
            bar.set_postfix(loss=f"{total:.4g}", refresh=False)
            if checkpoint and ((step + 1) % self.config.checkpoint_every == 0 or step + 1 == steps):
                self.save(checkpoint)

    def _enter(self, stage: str, lr: float) -> None:
        """A fresh optimiser at the start of a stage; the saved one when a stage goes on."""
        if self.optimizer is None:
            parameters = list(trainable(self.network).values())
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=self.config.weight_decay)
            # Prepared once: accelerate unscales the gradients of every optimiser it has been given.
            self.optimizer = self.accelerator.prepare(optimizer)
        if self.stage != stage:
            self.optimizer.optimizer.state.clear()
        elif self._optimizer_state is not None:
            self.optimizer.optimizer.load_state_dict(self._optimizer_state)
        self.stage, self._optimizer_state = stage, None

    def _set_lr(self, lr: float, step: int, steps: int) -> None:
        scale = 0.5 * (1 + math.cos(math.pi * step / steps)) if self.config.lr_schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr * scale

    def _check(self, loss: Tensor, noise: "Draws", stage: str, step: int) -> None:
        bad = ~loss.detach().isfinite()
        if not bad.any():
            return
        where = ""
        if noise.t is not None:
            tau = torch.tensor(self.milestones[::-1], device=bad.device)
            segments = sorted(set((torch.searchsorted(tau, noise.t[bad]) - 1).tolist()))
            where = f", segment {', '.join(map(str, segments))}"
        raise TrainingDivergedError(
            f"the loss is not finite in {stage}, step {step}{where}",
            hint="lower the learning rate, or train in float32; the last checkpoint is intact",
        )

    # Keeping.

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder, whole or not at all: the LoRA for pipelines, and what `resume` needs."""
        from safetensors.torch import save_file

        from mlcm.lora import LORA_FILE, export_lora

        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with replace_atomically(path) as partial:
                partial.mkdir()
                tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(self.network).items()}
                save_file(tensors, partial / "trainable.safetensors")
                if self.optimizer is not None:
                    torch.save(self.optimizer.optimizer.state_dict(), partial / "optimizer.pt")
                if any("lora_" in name for name in tensors):
                    export_lora(self.network, partial / LORA_FILE)
                if self.adversary is not None:
                    torch.save(self.adversary.state_dict(), partial / "adversary.pt")
                record = {
                    "config": self.config.model_dump(mode="json"), "milestones": self.milestones,
                    "progress": self.progress, "stage": self.stage,
                }  # fmt: skip
                (partial / STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()

    @classmethod
    def resume(
        cls,
        path: str | Path,
        teacher: nn.Module | Teacher,
        conditioner: Conditioner,
        accelerator: Accelerator | None = None,
        **kwargs: Any,
    ) -> "MLCMTrainer":
        """A trainer that goes on where `save` was called. kwargs: as of the constructor.

        Raises UserError when the folder is no checkpoint, or its tensors do not fit the network.
        """
        path = Path(path)
        try:
            record = json.loads((path / STATE).read_text(encoding="utf-8"))
            config = MLCMConfig(**record["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a checkpoint of mlcm ({type(error).__name__})", hint="wrong folder?"
            ) from error
        trainer = cls(teacher, config, conditioner, accelerator, **kwargs)
        trainer.load(path)
        return trainer

    def load(self, path: str | Path) -> None:
        """Take over weights, optimiser and progress of a checkpoint folder."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        own = trainable(self.network)
        try:
            record = json.loads((path / STATE).read_text(encoding="utf-8"))
            tensors = load_file(path / "trainable.safetensors")
            optimizer = path / "optimizer.pt"
            state = torch.load(optimizer, map_location="cpu", weights_only=True) if optimizer.exists() else None
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__}: {error})") from error
        match_shapes(tensors, own, path)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        self.progress = {**self.progress, **record["progress"]}
        self.stage, self._optimizer_state = record["stage"], state
        if (path / "adversary.pt").exists():
            self.adversary = self._make_adversary()
            self.adversary.load_state_dict(torch.load(path / "adversary.pt", map_location="cpu", weights_only=True))

    @property
    def student(self) -> Denoiser:
        """The student as it is now, outside the distributed wrapper."""
        return self._denoiser


class Draws:
    """The random numbers of one forward pass of one process."""

    def __init__(self, trainer: MLCMTrainer, stage: int, index: int, *, part: int | None = None):
        accelerator, config = trainer.accelerator, trainer.config
        total = config.batch_size * accelerator.num_processes
        mine = torch.arange(config.batch_size) + accelerator.process_index * config.batch_size
        if part is not None:
            mine = mine[mine % 2 == part]
        generator = seeded(config.seed, stage, index, 0 if part is None else part + 1)
        self.rows = RowNoise([generator], total, keep=mine, device=accelerator.device)
        prompts = self.rows.integers(0, len(trainer.conditioner) - 1)
        self.prompts = trainer.conditioner.prompts(prompts)
        self.condition = trainer.conditioner(prompts)
        self.t: Tensor | None = None
        self._again = lambda which: Draws(trainer, stage, index, part=which)

    def part(self, which: int) -> "Draws":
        """The even (0) or odd (1) rows of the global batch, with numbers of their own."""
        return self._again(which)


def _sync(accelerator: Accelerator, network: nn.Module, last: bool) -> Any:
    from contextlib import nullcontext

    return nullcontext() if last else accelerator.no_sync(network)


def trainable_lora(network: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA parameters that a network already has."""
    return {name: p for name, p in network.named_parameters() if "lora_" in name}


def latent_shape(network: nn.Module) -> tuple[int, ...]:
    """(channels, height, width) of a diffusers UNet. Raises UserError when its config does not say."""
    config = getattr(network, "config", None)
    size = getattr(config, "sample_size", None)
    if config is None or size is None:
        raise UserError(f"{type(network).__name__} does not say its latents' shape", hint="pass shape=")
    height, width = (size, size) if isinstance(size, int) else size
    return (config.in_channels, height, width)


def match_shapes(tensors: dict[str, Tensor], own: dict[str, nn.Parameter], source: str | Path) -> None:
    """Raise UserError naming the keys of `tensors` that do not fit `own`."""
    wrong = [f"{k} is missing" for k in own if k not in tensors]
    wrong += [f"{k} is not expected" for k in tensors if k not in own]
    wrong += [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(p.shape)}"
        for k, p in own.items()
        if k in tensors and tensors[k].shape != p.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(
            f"{source} does not fit the network: {'; '.join(wrong[:4])}{more}", hint="same rank and targets?"
        )
