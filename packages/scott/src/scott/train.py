"""The distillation of a diffusers U-Net: one teacher, up to three adapters of it, two optimisers (2403.01505).

    L = L_CD + λ_adv (−E[D(f_θ(z, t_n))]),   L_D = hinge(D(x), D(f_θ(z, t_n)))

Every random number of sample i of iteration k comes from a generator seeded with (seed, k, i). A resumed run therefore
needs no generator's state, and two processes that share a batch see what one process would have seen.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scott.adapters import TEACHER, AdapterStates
from scott.adversary import hinge_discriminator, hinge_generator, r1_penalty
from scott.conditioners import (
    ClassConditioner,
    Condition,
    Conditioner,
    NoConditioner,
    conditioner_for,
    guidance_embedding,
    join,
)
from scott.config import SCottConfig
from scott.consistency import (
    consistency_function,
    distance,
    guided,
    loss_weight,
    stochastic_target,
    training_times,
    update_average,
)
from scott.data import LatentDataset
from scott.discriminator import DISCRIMINATOR, LoRADiscriminator
from scott.sample import multistep
from scott.schedule import NoiseSchedule
from scott.solvers import NoiseStrength, PredictX0, SDESolver, draw

STUDENT, TARGET = "student", "target"
LORA_FILE, CONFIG_FILE, CHECKPOINT = "pytorch_lora_weights.safetensors", "scott.json", "checkpoint"
OMEGA_DIM = 256


@dataclass
class _Batch:
    """A share of one iteration's samples. x, noise: (batch, ...); t_n, t_m: long (batch); guidance: (batch)."""

    x: Tensor
    noise: Tensor
    t_n: Tensor
    t_m: Tensor
    guidance: Tensor
    condition: Condition
    empty: Condition | None
    generators: list[torch.Generator]


class SCottTrainer:
    """Distils a diffusion U-Net into a student of a few steps.

    teacher: a diffusers pipeline, or a U-Net with `schedule`. config: see SCottConfig.
    conditioner: from captions to the U-Net's arguments; found out from the teacher when not given.
    accelerator: accelerate's, for several processes and mixed precision; one is made when not given.

    Raises UserError when the student cannot be made from this teacher.
    """

    def __init__(
        self,
        teacher: Any,
        config: SCottConfig,
        *,
        conditioner: Conditioner | None = None,
        schedule: NoiseSchedule | None = None,
        accelerator: Any = None,
    ):
        from accelerate import Accelerator

        self.config = config
        self.accelerator = Accelerator() if accelerator is None else accelerator
        pipeline = teacher if hasattr(teacher, "unet") else None
        unet = (pipeline.unet if pipeline is not None else teacher).to(self.device)
        if schedule is None:
            if pipeline is None:
                raise UserError("a U-Net alone does not tell its noise schedule", hint="pass schedule=, or a pipeline")
            schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
        if config.skip >= schedule.timesteps or (config.grid or 1) > schedule.timesteps:
            raise UserError(
                f"skip {config.skip} and grid {config.grid} do not fit into {schedule.timesteps} time steps",
                hint="skip is in steps of the teacher's schedule",
            )
        if pipeline is not None and getattr(pipeline, "text_encoder", None) is not None:
            for name in ("text_encoder", "text_encoder_2"):
                if getattr(pipeline, name, None) is not None:
                    getattr(pipeline, name).requires_grad_(False).to(self.device)
        self.schedule = schedule
        self.conditioner = conditioner or (conditioner_for(pipeline) if pipeline is not None else _plain(unet))
        strength = NoiseStrength(config.noise_below, config.noise_ramp) if config.noise_below else None
        self.solver = SDESolver(
            schedule, config.solver, noise=config.noise, eta=config.eta, strength=strength, substeps=config.substeps
        )
        self.states = AdapterStates(unet)
        self.unet = self.states.unet
        self.step = 0
        self._make_student()
        self.discriminator: LoRADiscriminator | None = None
        self.optimizers = [torch.optim.AdamW(self.student_parameters, lr=config.lr, weight_decay=0.0)]
        if config.adv_weight > 0:
            self.discriminator = LoRADiscriminator(
                self.states, config.disc_rank, layers=config.disc_layers, seed=config.seed + 1
            )
            self.optimizers.append(
                torch.optim.AdamW(
                    self.discriminator.parameters(), lr=config.disc_lr, betas=(0.0, 0.99), weight_decay=0.0
                )
            )
        if config.gradient_checkpointing:
            for model in {id(m): m for m in (self.unet, self.student_unet)}.values():
                model.enable_gradient_checkpointing()

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.accelerator.device

    def _autocast(self) -> Any:
        """bfloat16 activations when the settings or the accelerator ask for them; weights and solver stay float32."""
        wanted = "bf16" in (self.config.mixed_precision, self.accelerator.mixed_precision)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def _make_student(self) -> None:
        config = self.config
        if config.student == "lora":
            self.student_unet = self.target_unet = self.unet
            self.student_parameters = self.states.add(STUDENT, config.rank, seed=config.seed)
            self.target_parameters = self.states.add(TARGET, config.rank, trainable=False)
            self.states.copy(STUDENT, TARGET)
            return
        self.student_unet = with_guidance_input(self.unet) if self._takes_omega() else copy.deepcopy(self.unet)
        self.student_unet.float().requires_grad_(True).eval()
        self.target_unet = copy.deepcopy(self.student_unet).requires_grad_(False)
        self.student_parameters = list(self.student_unet.parameters())
        self.target_parameters = list(self.target_unet.parameters())

    def _takes_omega(self) -> bool:
        if "cross_attention_dim" in self.unet.config:
            return True
        if isinstance(self.config.guidance, tuple):
            raise UserError(
                f"a range of guidance {self.config.guidance}, but {type(self.unet).__name__} can take no ω input",
                hint="give one number",
            )
        return False

    def _run(self, unet: nn.Module, state: str, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.states.use(state)
        with self._autocast():
            return unet(z.to(unet.dtype), t, **condition).sample.float()

    def teacher_x0(self, batch: _Batch) -> PredictX0:
        """The guided x̂ of the teacher, float32."""

        def x0(z: Tensor, t: Tensor) -> Tensor:
            if batch.empty is None:
                output = self._run(self.unet, TEACHER, z, t, batch.condition)
            else:
                both = self._run(
                    self.unet, TEACHER, torch.cat([z, z]), torch.cat([t, t]), join(batch.condition, batch.empty)
                )
                conditional, unconditional = both.chunk(2)
                output = guided(conditional, unconditional, batch.guidance)
            return self.schedule.predict_x0(output, z, t)

        return x0

    def consistency(self, which: str, batch: _Batch) -> PredictX0:
        """f of the student (`student`) or of its average (`target`), float32."""
        unet = self.student_unet if which == STUDENT else self.target_unet
        state = which if self.config.student == "lora" else TEACHER
        condition = dict(batch.condition)
        if unet.config.get("time_cond_proj_dim"):
            condition["timestep_cond"] = guidance_embedding(batch.guidance, unet.config.time_cond_proj_dim)

        def x0(z: Tensor, t: Tensor) -> Tensor:
            return self.schedule.predict_x0(self._run(unet, state, z, t, condition), z, t)

        return consistency_function(x0)

    def _draw(self, dataset: LatentDataset, samples: Sequence[int]) -> _Batch:
        """The samples with these numbers, of the present iteration."""
        config = self.config
        generators = [_generator(config.seed, self.step, i) for i in samples]
        rows = [int(torch.randint(len(dataset), (1,), generator=g)) for g in generators]
        x = torch.stack([dataset[row][0] for row in rows]).float()
        times = [
            training_times(1, timesteps=self.schedule.timesteps, skip=config.skip, grid=config.grid, generator=g)
            for g in generators
        ]
        low, high = config.guidance if isinstance(config.guidance, tuple) else (config.guidance, config.guidance)
        guidance = torch.tensor([low + (high - low) * float(torch.rand((), generator=g)) for g in generators])
        empty = None if low == high == 1.0 else self.conditioner.empty(len(rows))
        return _Batch(
            x=x.to(self.device),
            noise=draw(x.shape, x, generators).to(self.device),
            t_n=torch.cat([t_n for t_n, _ in times]).to(self.device),
            t_m=torch.cat([t_m for _, t_m in times]).to(self.device),
            guidance=guidance.to(self.device),
            condition=self.conditioner([dataset[row][1] for row in rows]),
            empty=empty or None,
            generators=generators,
        )

    def _losses(self, batch: _Batch, scale: float) -> dict[str, float]:
        """Add the gradients of a share of the batch to both networks; returns the sums of the terms."""
        config, student_turn = self.config, self.step >= self.config.disc_warmup
        z = self.schedule.add_noise(batch.x, batch.noise, batch.t_n)
        target = stochastic_target(
            self.solver, z, t_n=batch.t_n, t_m=batch.t_m, teacher=self.teacher_x0(batch),
            target=self.consistency(TARGET, batch), draws=config.draws, generator=batch.generators,
        )  # fmt: skip
        with torch.set_grad_enabled(student_turn):
            jump = self.consistency(STUDENT, batch)(z, batch.t_n)
        each = distance(jump, target, config.loss, huber_c=config.huber_c)
        loss = (each * loss_weight(self.schedule, batch.t_n, config.weighting).to(each.device)).sum()
        terms = {"cd": float(loss.detach())}
        if self.discriminator is not None:
            fake = jump.detach()
            judge = self._judge(batch)
            if student_turn:
                fake.requires_grad_(True)
                score = hinge_generator(judge(fake)).sum()
                # The gradient is taken in two parts, because checkpointed layers are recomputed in the state that is on
                # at that moment, and it must be the one they were first run with.
                self.states.use(DISCRIMINATOR)
                (push,) = torch.autograd.grad(score, fake)
                loss = loss + config.adv_weight * (jump * push).sum()
                terms["g"] = float(score.detach())
        if student_turn:
            if config.student == "lora":
                self.states.use(STUDENT)
            (loss * scale).backward()
        if self.discriminator is not None:
            real = batch.x.clone().requires_grad_(config.r1 > 0)
            # The fused attention kernels have no second derivative, which the penalty needs.
            with sdpa_kernel(SDPBackend.MATH) if config.r1 > 0 else nullcontext():
                real_score = judge(real)
            verdict = hinge_discriminator(real_score, judge(fake.detach())).sum()
            terms["d"] = float(verdict.detach())
            if config.r1 > 0:
                verdict = verdict + config.r1 * r1_penalty(real_score, real).sum()
            self.states.use(DISCRIMINATOR)
            (verdict * scale).backward()
        return terms

    def _judge(self, batch: _Batch) -> Callable[[Tensor], Tensor]:
        """The discriminator of clean latents at t_n, or of latents noised to a random time."""
        assert self.discriminator is not None
        discriminator, t, noise = self.discriminator, batch.t_n, None
        if self.config.renoise:
            times = [torch.randint(0, self.schedule.timesteps, (1,), generator=g) for g in batch.generators]
            t = torch.cat(times).to(self.device)
            noise = draw(batch.x.shape, batch.x, batch.generators)

        def judge(x: Tensor) -> Tensor:
            with self._autocast():
                return discriminator(x if noise is None else self.schedule.add_noise(x, noise, t), t, batch.condition)

        return judge

    def train_step(self, dataset: LatentDataset) -> dict[str, float]:
        """One iteration of both networks; returns the mean of each loss term over all processes.

        Raises UserError when a term is not finite.
        """
        config, accelerator = self.config, self.accelerator
        share = range(accelerator.process_index, config.batch, accelerator.num_processes)
        size = config.micro_batch or len(share)
        totals: dict[str, float] = {}
        for start in range(0, len(share), size):
            batch = self._draw(dataset, share[start : start + size])
            for name, value in self._losses(batch, 1 / config.batch).items():
                totals[name] = totals.get(name, 0.0) + value / config.batch
        names = sorted(totals)
        means = accelerator.reduce(torch.tensor([totals[n] for n in names], device=self.device), "sum").tolist()
        terms = dict(zip(names, means, strict=True))
        if not all(math.isfinite(value) for value in means):
            listed = ", ".join(f"{name} = {value:.4g}" for name, value in terms.items())
            raise UserError(
                f"loss not finite at iteration {self.step}: {listed}",
                hint="lower lr or disc_lr; the last checkpoint is untouched",
            )
        rate = 1.0
        if config.lr_schedule == "cosine":
            rate = (1 + math.cos(math.pi * self.step / config.iterations)) / 2
        for i, (optimizer, lr) in enumerate(zip(self.optimizers, (config.lr, config.disc_lr), strict=False)):
            if i == 0 and self.step < config.disc_warmup:
                continue
            parameters = optimizer.param_groups[0]["params"]
            self._reduce(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()
        update_average(self.target_parameters, [p.detach() for p in self.student_parameters], config.ema)
        self.step += 1
        return terms

    def _reduce(self, parameters: list[nn.Parameter]) -> None:
        """Sum the gradients over processes. By hand: the U-Net is run in four states a step, which DDP's hooks forbid."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
        for p, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            p.grad = part.view_as(p).clone()

    def fit(
        self,
        dataset: LatentDataset | None,
        *,
        output: str | Path | None = None,
        progress: Callable[[int, dict[str, float]], None] | None = None,
    ) -> list[dict[str, float]]:
        """Train up to config.iterations; returns the loss terms of the iterations done now.

        dataset: latents and captions; with data="teacher" only the captions are used (None for a teacher without).
        output: folder for a checkpoint every `checkpoint_every` iterations and the student at the end.

        Raises UserError when there is no data, the latents do not fit the U-Net, or the batch does not divide.
        """
        config = self.config
        if config.data == "teacher":
            dataset = self.teacher_dataset(dataset)
        if dataset is None or not len(dataset):
            raise UserError("no data to train on", hint="pass latents made by prepare-latents, or set data: teacher")
        shape = tuple(dataset[0][0].shape)
        if shape[0] != self.unet.config.in_channels:
            raise UserError(
                f"latents of {shape[0]} channels for a U-Net of {self.unet.config.in_channels}",
                hint="prepare the latents with this teacher's VAE",
            )
        if config.batch % self.accelerator.num_processes:
            raise UserError(
                f"a batch of {config.batch} cannot be shared by {self.accelerator.num_processes} processes evenly"
            )
        history = []
        while self.step < config.iterations:
            history.append(self.train_step(dataset))
            if progress:
                progress(self.step, history[-1])
            if output and (self.step % config.checkpoint_every == 0 or self.step == config.iterations):
                self.save(output)
        return history

    @torch.no_grad()
    def teacher_dataset(self, captions: LatentDataset | None, *, chunk: int = 16) -> LatentDataset:
        """config.teacher_samples samples of the guided teacher in config.teacher_steps deterministic steps."""
        config, dims = self.config, self.unet.config
        size = dims.sample_size if isinstance(dims.sample_size, tuple | list) else (dims.sample_size,) * 2
        ode = SDESolver(self.schedule, "ode", substeps=config.teacher_steps)
        latents, names = [], []
        for start in range(0, config.teacher_samples, chunk):
            numbers = range(start, min(start + chunk, config.teacher_samples))
            generators = [_generator(config.seed, 2**32 + i) for i in numbers]
            chosen = [captions[i % len(captions)][1] if captions else "" for i in numbers]
            x = draw(torch.Size((len(numbers), dims.in_channels, *size)), torch.zeros(()), generators).to(self.device)
            low, high = config.guidance if isinstance(config.guidance, tuple) else (config.guidance,) * 2
            batch = _Batch(
                x=x, noise=x, t_n=torch.full((len(x),), self.schedule.timesteps - 1, device=self.device),
                t_m=torch.zeros(len(x), dtype=torch.long, device=self.device),
                guidance=torch.full((len(x),), (low + high) / 2, device=self.device),
                condition=self.conditioner(chosen),
                empty=None if low == high == 1.0 else self.conditioner.empty(len(x)) or None, generators=generators,
            )  # fmt: skip
            latents.append(ode.solve(x, batch.t_n, batch.t_m, self.teacher_x0(batch)).cpu())
            names += chosen
        return LatentDataset.of(torch.cat(latents), names)

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str | int],
        *,
        steps: int,
        seed: int = 0,
        guidance: float | None = None,
        solver: SDESolver | None = None,
    ) -> Tensor:
        """Latents (len(captions), channels, height, width) from the student in `steps` calls.

        guidance: ω for a student with an ω input. Raises UserError when the student has none.
        """
        low, high = self.config.guidance if isinstance(self.config.guidance, tuple) else (self.config.guidance,) * 2
        if guidance is not None and not self.student_unet.config.get("time_cond_proj_dim"):
            raise UserError("guidance given to a student that was trained without an ω input", hint="leave it out")
        n, dims = len(captions), self.unet.config
        size = dims.sample_size if isinstance(dims.sample_size, tuple | list) else (dims.sample_size,) * 2
        generators = [_generator(seed, 2**33 + i) for i in range(n)]
        x = draw(torch.Size((n, dims.in_channels, *size)), torch.zeros(()), generators).to(self.device)
        omega = torch.full((n,), guidance if guidance is not None else (low + high) / 2, device=self.device)
        t = torch.zeros(n, dtype=torch.long, device=self.device)
        batch = _Batch(x, x, t, t, omega, self.conditioner(captions), None, generators)
        return multistep(
            self.consistency(STUDENT, batch), x, steps=steps, schedule=self.schedule, solver=solver,
            grid=self.config.grid or 50, generator=generators,
        )  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write the student (LoRA in diffusers' format, or a U-Net folder), the settings and a checkpoint, atomically."""
        from safetensors.torch import save_file

        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(folder / CHECKPOINT) as partial:
            partial.mkdir()
            save_file(self._state(), partial / "state.safetensors")
            (partial / "step.json").write_text(json.dumps({"step": self.step}), encoding="utf-8")
        if self.config.student == "lora":
            weights = {f"unet.{key}": value for key, value in self.states.state_dict(STUDENT).items()}
            with replace_atomically(folder / LORA_FILE) as partial:
                save_file(weights, partial, metadata={"format": "pt"})
        else:
            with replace_atomically(folder / "unet") as partial:
                self.student_unet.save_pretrained(partial)
        with replace_atomically(folder / CONFIG_FILE) as partial:
            partial.write_text(self.config.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def resume(cls, folder: str | Path, teacher: Any, **kwargs: Any) -> "SCottTrainer":
        """The trainer as `save` left it. kwargs: as for the constructor.

        Raises UserError when the folder holds no whole checkpoint of this teacher.
        """
        folder = Path(folder)
        if not (folder / CONFIG_FILE).exists():
            raise UserError(f"{folder} holds no checkpoint", hint="start without --resume")
        trainer = cls(teacher, SCottConfig.load(folder / CONFIG_FILE), **kwargs)
        trainer.load(folder)
        return trainer

    def load(self, folder: str | Path) -> None:
        """Take weights, optimisers and the iteration from a checkpoint. Errors as in `resume`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        checkpoint = Path(folder) / CHECKPOINT
        # A kill between the two renames of a replaced folder leaves the one before under this name.
        if not checkpoint.exists():
            checkpoint = checkpoint.with_name(f"{CHECKPOINT}.old")
        if not checkpoint.exists():
            raise UserError(f"{folder} holds no checkpoint", hint="start without --resume")
        try:
            state = load_file(checkpoint / "state.safetensors")
            step = int(json.loads((checkpoint / "step.json").read_text(encoding="utf-8"))["step"])
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise UserError(f"the checkpoint in {folder} is damaged ({error})", hint="start again") from error
        expected = {key: value.shape for key, value in self._state(fresh=True).items()}
        wrong = sorted({k for k in {*state} & {*expected} if state[k].shape != expected[k]} | ({*expected} - {*state}))
        if wrong:
            raise UserError(
                f"the checkpoint in {folder} is of another model or another configuration: {', '.join(wrong[:5])}"
            )
        with torch.no_grad():
            for name, parameters in self._weights().items():
                for i, p in enumerate(parameters):
                    p.copy_(state[f"{name}.{i}"])
        for j, optimizer in enumerate(self.optimizers):
            for i, p in enumerate(optimizer.param_groups[0]["params"]):
                prefix = f"optimizer{j}.{i}."
                kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                if kept:
                    # AdamW keeps its step count on the CPU.
                    optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in kept.items()}
        self.step = step

    def _weights(self) -> dict[str, list[nn.Parameter]]:
        named = {STUDENT: self.student_parameters, TARGET: self.target_parameters}
        if self.discriminator is not None:
            named["discriminator"] = list(self.discriminator.parameters())
        return named

    def _state(self, fresh: bool = False) -> dict[str, Tensor]:
        """Everything that training changes, by name; without the optimisers' part when `fresh`."""
        state = {f"{n}.{i}": p.detach() for n, ps in self._weights().items() for i, p in enumerate(ps)}
        if not fresh:
            for j, optimizer in enumerate(self.optimizers):
                for i, p in enumerate(optimizer.param_groups[0]["params"]):
                    state |= {f"optimizer{j}.{i}.{key}": value for key, value in optimizer.state.get(p, {}).items()}
        return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def with_guidance_input(unet: Any) -> Any:
    """A copy of a conditional U-Net that takes ω through `timestep_cond`, and at first does not heed it."""
    config = {**unet.config, "time_cond_proj_dim": OMEGA_DIM}
    student = type(unet).from_config(config).to(unet.device)
    weights = {key: value.float() for key, value in unet.state_dict().items()}
    missing, unexpected = student.load_state_dict(weights, strict=False)
    if unexpected or any("cond_proj" not in key for key in missing):
        raise UserError(f"no ω input could be added to {type(unet).__name__}: {', '.join([*missing, *unexpected][:5])}")
    if missing:
        nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def _plain(unet: Any) -> Conditioner:
    classes = unet.config.get("num_class_embeds")
    return ClassConditioner(classes, device=unet.device) if classes else NoConditioner()


def _generator(*numbers: int) -> torch.Generator:
    """A generator of its own for every tuple of numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)
