"""Training the reward on pairs.

    L = -log sigma(r_w - r_l) = cross-entropy of (r_w, r_l) with the winner as target            (2304.05977, section 3)

Label smoothing e moves e/2 of the target to the loser; `l2_reward` adds its multiple of mean r^2, since the loss does not
see a shift of all rewards. The first `fix_rate` of the layers stay as they are, embeddings included. ImageReward freezes
in the order of the parameters up to the first tensor of the limiting layer; here whole layers are frozen.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from facescore.errors import CheckpointError, TrainingError
from facescore.pairs.dataset import Pairs, split_by_source
from facescore.reward.checkpoint import save_reward
from facescore.reward.model import RewardModel

STATE = "training.pt"


@dataclass(frozen=True)
class RewardConfig:
    """How the reward is trained; the defaults are ImageReward's where it has them."""

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 10
    max_steps: int | None = None
    """Stops earlier than the epochs when given."""
    batch_size: int = 64
    """Pairs of one update, over all processes and accumulated micro-batches."""
    accumulation: int = 1
    fix_rate: float = 0.7
    label_smoothing: float = 0.0
    l2_reward: float = 0.0
    noise: float = 0.0
    """Largest standard deviation of noise on the normalised pixels, an augmentation against learning the generator's grain:
    each picture has a level of its own, so that of a pair either member may be the noisier one."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur in pixels of the crop; likewise each picture has its own amount."""
    flip: bool = False
    """Mirror both faces of a pair, half of the time."""
    dropout: bool = True
    warmup: int = 0
    validation: float = 0.1
    """Share of the sources held out; 0 trains on everything and keeps the last weights."""
    evaluate_every: int | None = None
    """Updates between validations; None is once an epoch."""
    patience: int | None = None
    """Validations without a better loss before training stops."""
    mixed_precision: str = "no"
    save_every: int | None = None
    """Updates between checkpoints in `output`; None is at every validation."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, wanted in (
            ("lr", self.lr > 0, "above 0"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("accumulation", self.accumulation >= 1, "1 or more"),
            ("fix_rate", 0 <= self.fix_rate <= 1, "in [0, 1]"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("l2_reward", self.l2_reward >= 0, "0 or more"),
            ("noise", self.noise >= 0, "0 or more"),
            ("blur", self.blur >= 0, "0 or more"),
            ("evaluate_every", self.evaluate_every is None or self.evaluate_every >= 1, "1 or more"),
            ("save_every", self.save_every is None or self.save_every >= 1, "1 or more"),
            ("mixed_precision", self.mixed_precision in ("no", "bf16", "fp16"), "no, bf16 or fp16"),
            ("validation", 0 <= self.validation < 1, "in [0, 1)"),
        ):
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)}, expected {wanted}")


@dataclass
class TrainingReport:
    """What training did."""

    steps: int
    best_loss: float
    """Of the validation pairs (of the training pairs when there are none)."""
    best_accuracy: float
    history: list[dict[str, float]] = field(default_factory=list)
    """Per validation: step, loss, accuracy, and the mean and deviation of the rewards, which may drift."""


def pair_loss(rewards: Tensor, *, label_smoothing: float = 0.0, l2_reward: float = 0.0) -> Tensor:
    """The loss of rewards (batch, 2), winners first; a mean over the batch."""
    target = torch.zeros(len(rewards), dtype=torch.long, device=rewards.device)
    loss = F.cross_entropy(rewards, target, label_smoothing=label_smoothing)
    return loss + l2_reward * rewards.square().mean() if l2_reward else loss


def freeze(model: RewardModel, fix_rate: float) -> list[str]:
    """Freeze text layers below int(depth_text f) and vision blocks below int(depth_vision f), embeddings with them.

    At 1 the final norm of the vision tower is frozen too, so that only the head trains. Returns the names of the frozen
    parameters. The unused projections of official checkpoints are no parameters here and never train.
    """
    c = model.config
    frozen: list[Any] = []
    if int(c.vision_depth * fix_rate) > 0:
        frozen += [model.vision.embeddings, *model.vision.encoder.layers[: int(c.vision_depth * fix_rate)]]
    if int(c.text_depth * fix_rate) > 0:
        frozen += [model.text.embeddings, *model.text.encoder.layer[: int(c.text_depth * fix_rate)]]
    if fix_rate == 1:
        frozen.append(model.vision.post_layernorm)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for module in frozen:
        module.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


class RewardTrainer:
    """Trains a `RewardModel` on pairs, through accelerate: one process or many, with the user's own launch settings.

    output: folder for checkpoints (`training.pt`) and the best model; None keeps nothing on disk. Every update has a seed
    of its own, so that a run which was killed and resumed ends with the weights of one that was not.
    """

    def __init__(
        self, model: RewardModel, pairs: Pairs, config: RewardConfig | None = None, *, output: str | Path | None = None
    ):
        self.model, self.pairs, self.config = model, pairs, config or RewardConfig()
        self.output = Path(output) if output is not None else None
        if len(pairs) < 1:
            raise UserError("there are no pairs to train on")
        self.frozen = freeze(model, self.config.fix_rate)
        self.train_rows, self.validation_rows = split_by_source(pairs, self.config.validation, seed=self.config.seed)
        if not self.train_rows:
            raise UserError(f"no pairs left to train on with validation {self.config.validation}")
        self._cache: dict[int, Tensor] = {}

    def train(self, *, resume: bool = False) -> TrainingReport:
        """Train to the end, leave the best weights in the model and in `output`, and tell what happened.

        resume: go on from `training.pt` in `output`. Raises TrainingError with the pair ids when the loss is not finite.
        """
        from accelerate import Accelerator

        c = self.config
        accelerator = Accelerator(mixed_precision=c.mixed_precision)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=c.lr, betas=c.betas, eps=1e-8)
        per_epoch = max(1, len(self.train_rows) // c.batch_size)
        total = min(c.epochs * per_epoch, c.max_steps or c.epochs * per_epoch)
        every = c.evaluate_every or per_epoch
        model, optimizer = accelerator.prepare(self.model, optimizer)
        step, best, best_state, waited = 0, (math.inf, 0.0), None, 0
        history: list[dict[str, float]] = []
        if resume:
            saved = self._load()
            if saved is not None:
                self.model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                step, best, best_state = saved["step"], tuple(saved["best"]), saved["best_model"]
                waited, history = saved["waited"], saved["history"]
        bar = tqdm(
            total=total,
            initial=step,
            desc="reward",
            disable=None if accelerator.is_main_process else True,
            mininterval=2,
        )
        while step < total and not (c.patience is not None and waited > c.patience):
            rows = self._batch(step, per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = c.lr * self._schedule(step, total)
            self._update(accelerator, model, optimizer, rows, step)
            step += 1
            bar.update()
            validated = step % every == 0 or step == total
            if validated:
                record = {"step": float(step), **self.validate()}
                history.append(record)
                if record["loss"] < best[0]:
                    best, waited = (record["loss"], record["accuracy"]), 0
                    if c.validation > 0:
                        best_state = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
                else:
                    waited += 1
            if (
                self.output is not None
                and accelerator.is_main_process
                and (step % c.save_every == 0 if c.save_every else validated)
            ):
                self._save(
                    {"step": step, "best": list(best), "best_model": best_state, "waited": waited, "history": history,
                     "model": self.model.state_dict(), "optimizer": optimizer.state_dict(),
                     "config": json.dumps(asdict(c))}
                )  # fmt: skip
        bar.close()
        if best_state is not None:
            self.model.load_state_dict(best_state)
        self.model.eval()
        if self.output is not None and accelerator.is_main_process:
            save_reward(self.model, self.output / "model")
        accelerator.wait_for_everyone()
        return TrainingReport(step, *best, history)

    def _batch(self, step: int, per_epoch: int) -> list[int]:
        """Rows of one update: the epoch's permutation, cut."""
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.train_rows))
        chosen = order[place * self.config.batch_size : (place + 1) * self.config.batch_size]
        return [self.train_rows[i] for i in chosen]

    def _schedule(self, step: int, total: int) -> float:
        """Linear warm-up, then cosine to 0."""
        if step < self.config.warmup:
            return (step + 1) / self.config.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.config.warmup) / max(1, total - self.config.warmup)))

    def _update(self, accelerator: Any, model: Any, optimizer: Any, rows: list[int], step: int) -> None:
        c = self.config
        model.train(c.dropout)
        generator = torch.Generator().manual_seed(c.seed * 1_000_003 + step)
        pixels = self._augment(self._pixels(rows), generator)
        torch.manual_seed(c.seed * 1_000_003 + step + 7919 * accelerator.process_index)
        mine = _share(len(rows), accelerator.process_index, accelerator.num_processes)
        parts = [p for p in np.array_split(np.array(mine), c.accumulation) if len(p)]
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with torch.enable_grad(), _sync(accelerator, model, last):
                rewards = self._rewards(model, [rows[j] for j in part], pixels[part])
                loss = pair_loss(rewards, label_smoothing=c.label_smoothing, l2_reward=c.l2_reward)
                if not torch.isfinite(loss):
                    ids = ", ".join(self.pairs.ids[rows[j]] for j in part[:8])
                    raise TrainingError(f"the loss is {loss.item()} at update {step}; pairs {ids}", hint="lower lr")
                # DDP averages over processes; the weights make that the mean over the whole batch.
                accelerator.backward(loss * (len(part) * accelerator.num_processes / len(rows)))
        optimizer.step()

    def _rewards(self, model: Any, rows: Sequence[int], pixels: Tensor) -> Tensor:
        """(batch, 2) rewards; from cached features when only the head trains."""
        n = len(rows)
        if self.config.fix_rate == 1 and not (self.config.noise or self.config.blur or self.config.flip):
            return self.model.head(self._features(rows, pixels).flatten(0, 1)).view(n, 2)
        device = next(self.model.parameters()).device
        return model(pixels.flatten(0, 1).to(device)).view(n, 2)

    @torch.no_grad()
    def _features(self, rows: Sequence[int], pixels: Tensor) -> Tensor:
        """(batch, 2, text_width), computed once per pair: the encoders are frozen and without dropout."""
        missing = [i for i, row in enumerate(rows) if row not in self._cache]
        if missing:
            training = self.model.training
            self.model.eval()
            device = next(self.model.parameters()).device
            flat = pixels[missing].flatten(0, 1).to(device)
            features = self.model.feature(self.model.vision_tokens(flat)).view(len(missing), 2, -1)
            self._cache.update({rows[i]: f for i, f in zip(missing, features, strict=True)})
            self.model.train(training)
        return torch.stack([self._cache[row] for row in rows])

    def _pixels(self, rows: Sequence[int]) -> Tensor:
        """(batch, 2, 3, S, S), winners first."""
        size = self.model.config.image_size
        return torch.stack([torch.stack(self.pairs.pixels(row, size)) for row in rows])

    def _augment(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        from torchvision.transforms.v2.functional import gaussian_blur

        if self.config.flip:
            mirrored = torch.rand(len(pixels), generator=generator) < 0.5
            pixels = torch.where(mirrored[:, None, None, None, None], pixels.flip(-1), pixels)
        if self.config.blur:
            kernel = [2 * math.ceil(2 * self.config.blur) + 1] * 2
            blurred = gaussian_blur(pixels.flatten(0, 1), kernel, [self.config.blur] * 2).view_as(pixels)
            pixels = pixels + _levels(pixels, generator) * (blurred - pixels)
        if self.config.noise:
            level = self.config.noise * _levels(pixels, generator)
            pixels = pixels + level * torch.randn(pixels.shape, generator=generator)
        return pixels

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss, accuracy (ties count one half), and mean and deviation of the rewards of the validation pairs."""
        rows = self.validation_rows or self.train_rows
        self.model.eval()
        rewards = torch.cat(
            [
                self._rewards(self.model, part, self._pixels(part)).float().cpu()
                for part in (rows[i : i + 128] for i in range(0, len(rows), 128))
            ]
        )
        margin = rewards[:, 0] - rewards[:, 1]
        return {
            "loss": pair_loss(rewards).item(),
            "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item(),
            "mean": rewards.mean().item(),
            "std": rewards.std().item(),
        }

    def _save(self, state: dict[str, Any]) -> None:
        assert self.output is not None
        with replace_atomically(self.output / STATE) as partial:
            torch.save(state, partial)

    def _load(self) -> dict[str, Any] | None:
        if self.output is None:
            raise UserError("resume needs the output folder of the run")
        path = self.output / STATE
        if not path.is_file():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            before = json.loads(saved["config"])
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            raise CheckpointError(
                f"'{path}' is damaged ({type(error).__name__})", hint="start without resume"
            ) from error
        now = json.loads(json.dumps(asdict(self.config)))
        if changed := sorted(k for k in now if now[k] != before.get(k)):
            raise UserError(
                f"'{path}' was made with another {', '.join(changed)}", hint="resume with the same settings"
            )
        return saved


def _levels(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(batch, 2, 1, 1, 1) in [0, 1)."""
    return torch.rand(pixels.shape[:2], generator=generator)[:, :, None, None, None]


def _share(n: int, index: int, processes: int) -> list[int]:
    return [int(i) for i in np.array_split(np.arange(n), processes)[index]]


def _sync(accelerator: Any, model: Any, last: bool) -> Any:
    """Gradients are exchanged with the last micro-batch only."""
    import contextlib

    return contextlib.nullcontext() if last else accelerator.no_sync(model)
