"""Stage 4: distribution matching and a discriminator, both data-free (arXiv 2406.05768, optional last stage).

Distribution matching pulls the student's prediction x̂, noised to t', along the difference of two scores: that of a fake score
network, which is kept trained on the student's samples, and the teacher's. The discriminator tells the student's several-step
samples (real) from its one-jump predictions (fake), both noised to t'.
"""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from mlcm.network import Condition, Denoiser, Teacher, trainable
from mlcm.randomness import RowNoise
from mlcm.schedule import NoiseSchedule


def twin(network: nn.Module) -> nn.Module:
    """A second network with trainable parameters of its own; the frozen ones are shared and cost no memory.

    Its LoRA starts at zero, so it begins as the teacher.
    """
    frozen: dict[int, Any] = {id(p): p for p in network.parameters() if not p.requires_grad}
    other = copy.deepcopy(network, frozen)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return other


class Discriminator(nn.Module):
    """A twin of the teacher up to its middle, and a small head. Answers one logit per row (batch,)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        channels = network.config.block_out_channels[-1]
        self.head = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))
        self._features: Tensor | None = None
        network.mid_block.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._features = output

    def forward(self, z: Tensor, t: Tensor, arguments: dict[str, Any]) -> Tensor:
        self.network(z, t, **arguments)
        assert self._features is not None
        return self.head(self._features.float().mean((2, 3))).squeeze(1)


class Adversary:
    """The fake score and the discriminator, with their optimiser.

    network: the student inside the teacher, a diffusers UNet. teacher: guided x̂ of the real score.
    """

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, accelerator: Accelerator, *,
        lr: float, guidance_scale: float, teacher: Teacher,
    ):  # fmt: skip
        self.schedule, self.accelerator, self.guidance_scale, self.teacher = (
            schedule,
            accelerator,
            guidance_scale,
            teacher,
        )
        self.fake = twin(network)
        discriminator = Discriminator(twin(network))
        # The half after the middle sees no gradient; a distributed wrapper must not wait for it.
        used = ("down_blocks", "mid_block", "conv_in", "time_embedding", "head")
        for name, parameter in discriminator.named_parameters():
            if parameter.requires_grad and not any(part in name for part in used):
                parameter.requires_grad_(False)
        self.discriminator = discriminator.to(accelerator.device)
        self.parameters = [*trainable(self.fake).values(), *trainable(self.discriminator).values()]
        self._optimizer = torch.optim.AdamW(self.parameters, lr=lr)
        self.score = Denoiser(self.fake, schedule)

    def update(self, predicted: Tensor, real: Tensor, condition: Condition, noise: RowNoise) -> None:
        """One step of both on the student's present samples. predicted, real: (batch, ...), detached."""
        t = noise.integers(1, self.schedule.last)
        z = self.schedule.add_noise(predicted, noise.normal(*predicted.shape[1:]), t)
        # In noise rather than x̂, the loss is x̂'s weighted by (alpha / sigma)^2; capped, as it grows without bound.
        weight = (self.schedule.alpha(t, z) / self.schedule.sigma(t, z)).square().clamp_max(5)
        score = (weight * (self.score.x0(z, t, condition) - predicted).square()).mean()
        apart = functional.softplus(-self._logit(real, condition, noise)).mean()
        apart = apart + functional.softplus(self._logit(predicted, condition, noise)).mean()
        # The student's own loss has left its gradient in the discriminator.
        self._optimizer.zero_grad()
        (score + apart).backward()
        self._average_gradients()
        self._optimizer.step()

    def pull(self, predicted: Tensor, condition: Condition, noise: RowNoise) -> Tensor:
        """Loss per row (batch,) whose gradient is (score of fake - score of real) at the noised prediction, plus the
        generator's loss against the discriminator. predicted: (batch, ...) with gradient."""
        t = noise.integers(self.schedule.last // 50, self.schedule.last * 49 // 50)
        with torch.no_grad():
            z = self.schedule.add_noise(predicted, noise.normal(*predicted.shape[1:]), t)
            fake = self.score.x0(z, t, condition)
            real = self.teacher(z, t, condition, self.guidance_scale)
            # Normalised by the distance to the real prediction, as the scores' sizes vary over t by orders of magnitude.
            size = (predicted - real).abs().flatten(1).mean(1).clamp_min(1e-4).view(-1, *[1] * (z.ndim - 1))
            target = predicted - (fake - real) / size
        matching = 0.5 * (predicted - target).square().flatten(1).mean(1)
        return matching + functional.softplus(-self._logit(predicted, condition, noise))

    def _logit(self, x: Tensor, condition: Condition, noise: RowNoise) -> Tensor:
        t = noise.integers(1, self.schedule.last)
        z = self.schedule.add_noise(x, noise.normal(*x.shape[1:]), t)
        return self.discriminator(z, self.schedule.network_time(t), condition.given)

    def _average_gradients(self) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def state_dict(self) -> dict[str, Any]:
        """Trainable parts and the optimiser's state."""
        return {
            "fake": {k: v.detach() for k, v in trainable(self.fake).items()},
            "discriminator": {k: v.detach() for k, v in trainable(self.discriminator).items()},
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.fake.load_state_dict(state["fake"], strict=False)
        self.discriminator.load_state_dict(state["discriminator"], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])
