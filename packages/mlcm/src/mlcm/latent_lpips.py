"""Latent LPIPS: a perceptual distance on 4-channel latents (arXiv 2406.05768, stage 1; after ELatentLPIPS).

VGG16's 13 convolutions with a 4-channel input and the first three of its max-pools left out, as a latent is already small.
"""

from pathlib import Path

import torch
from tenfold_shared.errors import UserError
from torch import Tensor, nn

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
POOLED_BEFORE = (4,)
"""Blocks with a max-pool before them: VGG16's fourth pool is the only one left between blocks."""


class LatentLPIPS(nn.Module):
    """Weighted squared differences of unit-normalised features, averaged over the plane and summed over blocks.

    width: share of VGG16's channels, 1 for the published size; tests use less.
    """

    def __init__(self, channels: int = 4, *, width: float = 1.0):
        super().__init__()
        self.blocks, before = nn.ModuleList(), channels
        for i, sizes in enumerate(BLOCKS):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if i in POOLED_BEFORE else []
            for size in sizes:
                layers += [nn.Conv2d(before, max(1, int(size * width)), 3, padding=1), nn.ReLU()]
                before = max(1, int(size * width))
            self.blocks.append(nn.Sequential(*layers))
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(max(1, int(s[-1] * width)))) for s in BLOCKS)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Latents (batch, 4, height, width) each, to distances (batch,). Exactly 0 for equal latents."""
        total = a.new_zeros(len(a))
        for block, weight in zip(self.blocks, self.weights, strict=True):
            a, b = block(a), block(b)
            apart = (_unit(a) - _unit(b)).square().mean((2, 3))
            total = total + (apart * weight.clamp_min(0)).sum(1)
        return total

    @classmethod
    def load(cls, path: str | Path, *, width: float = 1.0) -> "LatentLPIPS":
        """Weights of a safetensors file, frozen. Raises UserError when they do not fit."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        network = cls(width=width)
        try:
            network.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:120]
            raise UserError(f"{path} holds no latent LPIPS ({reason})", hint="use loss: l2") from error
        return network.requires_grad_(False).eval()


def train_step(
    network: LatentLPIPS, optimizer: torch.optim.Optimizer, triplet: tuple[Tensor, Tensor, Tensor], judge: Tensor
) -> float:
    """One step on two-alternative judgements, as BAPPS has them.

    triplet: reference and two distortions, latents (batch, 4, height, width). judge: share of people who found the second
    distortion nearer (batch,). Returns the loss, a cross-entropy on the difference of the distances.
    """
    reference, first, second = triplet
    apart = network(reference, first) - network(reference, second)
    loss = nn.functional.binary_cross_entropy_with_logits(apart, judge)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + 1e-10).sqrt()
