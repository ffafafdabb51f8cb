"""Fine-tuning a QANN with its own ANN as the teacher (2406.03470, quantisation-aware training).

    official   CE + tau^2 mean( w CE(softmax(t / tau), z / tau) ),   w = 1 - exp(-CE_student / CE_teacher) without gradient
    kl         tau^2 KL(softmax(t / tau) || softmax(z / tau))

z, t: logits of student and teacher. One process or many: batches are split over the processes of `accelerate launch`, and
the steps' gradients are scaled for the whole batch, so that both give the same weights.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor, nn
from torch.nn import functional as F

from spikezip.errors import CheckpointError
from spikezip.qann.calibration import call
from spikezip.qann.quantizer import keep_positive, quantizers

log = logging.getLogger(__name__)
LOSSES = ("official", "kl")


def distillation_loss(student: Tensor, teacher: Tensor, *, labels: Tensor | None, tau: float, kind: str) -> Tensor:
    """The loss of one batch. student, teacher: (B, C) logits. labels: (B,), needed by "official"."""
    soft = (teacher / tau).softmax(-1)
    if kind == "kl":
        return tau**2 * F.kl_div((student / tau).log_softmax(-1), soft, reduction="batchmean")
    if labels is None:
        raise UserError("the official loss needs labels", hint="give batches (inputs, labels), or use loss='kl'")
    own = F.cross_entropy(student, labels, reduction="none")
    theirs = F.cross_entropy(teacher, labels, reduction="none")
    weight = (1 - torch.exp(-own.detach() / theirs.clamp(min=1e-8))).detach()
    soft_ce = -(soft * (student / tau).log_softmax(-1)).sum(-1)
    return own.mean() + tau**2 * (weight * soft_ce).mean()


def split(batch: Any) -> tuple[Any, Tensor | None]:
    """Inputs and labels of a batch: (inputs, labels), a mapping with "labels", or inputs alone."""
    if isinstance(batch, Mapping):
        return batch, batch.get("labels", batch.get("label"))
    if isinstance(batch, tuple | list):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


class QATTrainer:
    """Trains a calibrated QANN against a teacher.

    teacher: the ANN it was made from. temperature: tau. loss: "official" or "kl". lr: peak learning rate of AdamW, cosine
    to `final_lr`. clip: largest gradient norm. augment: called on each batch's inputs before both networks see them.
    output: folder for a checkpoint after each epoch; resume: go on from it.

    Raises UserError for a value out of range, UncalibratedError when a quantiser has no step yet.
    """

    def __init__(
        self,
        qann: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 2.0,
        loss: str = "official",
        lr: float = 1e-3,
        final_lr: float = 1e-6,
        weight_decay: float = 0.02,
        clip: float = 1.0,
        seed: int = 0,
        device: str = "auto",
        augment: Callable[[Any], Any] | None = None,
        output: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        if loss not in LOSSES:
            raise UserError(f"loss is '{loss}', expected one of {', '.join(LOSSES)}")
        if not temperature > 0 or not lr > 0:
            raise UserError(f"temperature is {temperature} and lr {lr}, expected numbers above 0")
        if resume and output is None:
            raise UserError("resume needs an output folder that holds a checkpoint")
        for name, quantizer in quantizers(qann).items():
            quantizer.check(name)
        self.qann, self.teacher, self.tau, self.loss = qann, teacher, temperature, loss
        self.lr, self.final_lr, self.weight_decay, self.clip = lr, final_lr, weight_decay, clip
        self.seed, self.device, self.augment = seed, device, augment
        self.output, self.resume = Path(output) if output is not None else None, resume
        self.history: list[float] = []
        """Mean loss of each epoch."""

    def fit(self, loader: Any, epochs: int) -> nn.Module:
        """Train for `epochs` and return the QANN, in evaluation mode.

        loader: a DataLoader of (inputs, labels) or mappings. The order of a shuffled one follows from the seed and the epoch.
        """
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration, set_seed

        if epochs < 1:
            raise UserError(f"epochs is {epochs}, expected 1 or more")
        accelerator = Accelerator(
            cpu=self.device == "cpu",
            dataloader_config=DataLoaderConfiguration(
                split_batches=True, use_seedable_sampler=True, data_seed=self.seed
            ),
        )
        set_seed(self.seed)
        for quantizer in quantizers(self.qann).values():
            quantizer.replicas = accelerator.num_processes
        decayed = [p for p in self.qann.parameters() if p.dim() > 1]
        others = [p for p in self.qann.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        model, optimizer, loader = accelerator.prepare(self.qann, optimizer, loader)
        teacher = self.teacher.to(accelerator.device).eval()
        start = self._restore(optimizer, accelerator.device) if self.resume else 0
        total = epochs * max(len(loader), 1)
        for epoch in range(start, epochs):
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            # Dropout and augmentation of an epoch follow from its number, so that a resumed run repeats them.
            set_seed(self.seed * 100_003 + epoch)
            model.train()
            losses = []
            for i, batch in enumerate(loader):
                rate = self.final_lr + (self.lr - self.final_lr) * 0.5 * (
                    1 + math.cos(math.pi * (epoch * len(loader) + i) / total)
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                losses.append(self._step(accelerator, model, teacher, optimizer, batch))
            self.history.append(float(torch.stack(losses).mean()))
            log.info("epoch %d of %d: loss %.4f", epoch + 1, epochs, self.history[-1])
            if self.output is not None:
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    self._keep(optimizer, epoch + 1)
                accelerator.wait_for_everyone()
        for quantizer in quantizers(self.qann).values():
            quantizer.replicas = 1
        return self.qann.eval()

    def _step(self, accelerator: Any, model: nn.Module, teacher: nn.Module, optimizer: Any, batch: Any) -> Tensor:
        inputs, labels = split(batch)
        if self.augment is not None:
            inputs = self.augment(inputs)
        with torch.no_grad():
            target = call(teacher, inputs)
        loss = distillation_loss(call(model, inputs), target, labels=labels, tau=self.tau, kind=self.loss)
        if not bool(torch.isfinite(loss)):
            raise UserError(
                "the loss is not finite", hint="lower lr, or calibrate with method='percentile' for outliers"
            )
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()
        keep_positive(self.qann)
        return loss.detach()

    def _keep(self, optimizer: Any, epochs: int) -> None:
        assert self.output is not None
        state = optimizer.optimizer.state_dict()
        tensors = {f"model.{k}": v.contiguous().clone() for k, v in self.qann.state_dict().items()}
        for index, slots in state["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value.contiguous() for name, value in slots.items()}
        with replace_atomically(self.output / "checkpoint") as partial:
            partial.mkdir()
            save_file(tensors, str(partial / "state.safetensors"))
            (partial / "progress.json").write_text(json.dumps({"epochs": epochs, "history": self.history}), "utf-8")

    def _restore(self, optimizer: Any, device: torch.device) -> int:
        assert self.output is not None
        folder = self.output / "checkpoint"
        if not (folder / "progress.json").is_file():
            raise CheckpointError(f"{folder} holds no checkpoint to resume from", hint="run once without --resume")
        progress = json.loads((folder / "progress.json").read_text("utf-8"))
        tensors = load_file(str(folder / "state.safetensors"), device=str(device))
        prefix = "model."
        self.qann.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        state = optimizer.optimizer.state_dict()
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                slots.setdefault(int(index), {})[name] = value
        optimizer.optimizer.load_state_dict({**state, "state": slots})
        self.history = list(progress["history"])
        return int(progress["epochs"])
