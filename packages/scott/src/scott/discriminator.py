"""A discriminator made of the teacher: its U-Net with a LoRA in the decoder, and a small head (2403.01505).

Because the teacher's own layers read the noise level and the prompt, D(x, c, t) is conditional for free, and only the LoRA
and the head are trained.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from scott.adapters import AdapterStates

DISCRIMINATOR = "disc"


class LoRADiscriminator(nn.Module):
    """D(x, t, c): one score per sample.

    states: the U-Net's adapters; one more, called `disc`, is added to its up blocks. A bare U-Net is accepted too.
    rank: of the LoRA. layers: `all` or `attention`. hidden: channels of the head. seed: of the initial weights.

    `parameters()` are what is to be trained: LoRA and head; the U-Net is not among them.
    """

    def __init__(
        self,
        states: AdapterStates | nn.Module,
        rank: int = 48,
        *,
        layers: Literal["all", "attention"] = "all",
        hidden: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        # In a list, so that the U-Net does not become a sub-module whose parameters would be ours.
        self._states = [states if isinstance(states, AdapterStates) else AdapterStates(states)]
        self.lora = nn.ParameterList(self.states.add(DISCRIMINATOR, rank, layers=layers, decoder_only=True, seed=seed))
        channels = self.states.unet.conv_out.in_channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, 1, 1))
        self.head.to(next(iter(self.lora)).device)

    @property
    def states(self) -> AdapterStates:
        """The adapters of the U-Net behind this discriminator."""
        return self._states[0]

    def forward(self, x: Tensor, t: Tensor, condition: dict[str, Any] | None = None) -> Tensor:
        """Scores (batch). x: clean or re-noised latents (batch, channels, height, width); t: long (batch);
        condition: keyword arguments of the U-Net."""
        features: list[Tensor] = []
        with self.states.using(DISCRIMINATOR) as unet:
            hook = unet.conv_out.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
            try:
                unet(x.to(unet.dtype), t, **(condition or {}))
            finally:
                hook.remove()
        return self.head(features[0].float()).mean((1, 2, 3))
