"""The adversarial half of SCott: hinge losses and an optional gradient penalty (2403.01505).

    L_D = E[max(0, 1 − D(x))] + E[max(0, 1 + D(x̂))],   L_G = L_CD − λ_adv E[D(x̂)]

The consistency loss alone pulls a stochastic student to averages; this term is what pulls it back onto the data.
"""

import torch
from torch import Tensor


def hinge_discriminator(real_score: Tensor, fake_score: Tensor) -> Tensor:
    """L_D per sample; 2 at a discriminator that answers 0. Scores: (*batch)."""
    return (1 - real_score).relu() + (1 + fake_score).relu()


def hinge_generator(fake_score: Tensor) -> Tensor:
    """−D(x̂) per sample: without the hinge, which would stop teaching a student that is far off."""
    return -fake_score


def r1_penalty(real_score: Tensor, real: Tensor) -> Tensor:
    """‖∂D/∂x‖² / 2 per sample. real_score: (batch); real: (batch, ...), requiring a gradient."""
    (gradient,) = torch.autograd.grad(real_score.sum(), real, create_graph=True)
    return gradient.square().flatten(1).sum(1) / 2
