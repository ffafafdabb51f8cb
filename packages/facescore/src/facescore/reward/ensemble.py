"""How sure a reward is: several heads on the same features.

The head has no activation, so a head is one affine map, and training heads on frozen features is logistic regression on the
difference d of the two features of a pair. Member i sees a bootstrap sample of the n pairs and minimises

    mean softplus(-w d) + ridge |w - a_i|^2,        a_i ~ N(own head, 1 / (2 n ridge))

with an anchor a_i of its own, drawn from the prior that the ridge stands for. Members pulled to one anchor would agree
wherever the pairs say nothing, which is where they should be least sure. Pairs do not fix the height of a score, so all
members are given the own head's at the mean feature of the pairs. Their disagreement is the uncertainty.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tenfold_shared.errors import UserError
from torch import Tensor
from torch.nn import functional as F

from facescore.pairs.dataset import Pairs
from facescore.reward.model import RewardModel


@dataclass
class HeadEnsemble:
    """Affine heads on the features of one model: weights (members, text_width) and biases (members,)."""

    model: RewardModel
    weights: Tensor
    bias: Tensor

    @classmethod
    def fit(
        cls, model: RewardModel, pairs: Pairs, *, members: int = 8, ridge: float = 1e-2, seed: int = 0
    ) -> "HeadEnsemble":
        """Fit the members. ridge: pull towards the anchors, in units of the pairs' mean loss."""
        if members < 2 or len(pairs) < 2:
            raise UserError(f"an ensemble needs 2 or more members and pairs, given {members} and {len(pairs)}")
        size = model.config.image_size
        own, bias = model.collapse_head()
        with torch.no_grad():
            features = torch.stack(
                [model.feature(model.vision_tokens(torch.stack(pairs.pixels(i, size)))) for i in range(len(pairs))]
            )
        d, center, own = features[:, 0] - features[:, 1], features.mean((0, 1)), own.float()
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        prior = (2 * len(d) * ridge) ** -0.5
        members_w = []
        for _ in range(members):
            anchor = own + prior * torch.randn(own.shape, generator=generator).to(own.device)
            rows = torch.from_numpy(rng.integers(0, len(d), len(d)))
            members_w.append(_logistic(d[rows], anchor, ridge))
        weights = torch.stack(members_w)
        return cls(model, weights, bias + (own - weights) @ center)

    @torch.no_grad()
    def score_crops(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the members, (n,) each, of normalised crops (n, 3, S, S)."""
        scores = self.model.feature(self.model.vision_tokens(pixel_values)) @ self.weights.T + self.bias
        return scores.mean(1), scores.std(1)


def _logistic(differences: Tensor, anchor: Tensor, ridge: float) -> Tensor:
    weight = anchor.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-(differences @ weight)).mean() + ridge * (weight - anchor).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()
