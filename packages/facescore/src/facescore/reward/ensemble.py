"""How sure a reward is: several heads on the same features.

The head has no activation, so a head is one affine map, and training heads on frozen features is logistic regression on the
difference of the two features of a pair. Each member sees a bootstrap sample of the pairs and is held near the model's own
head by a ridge; their disagreement is the uncertainty.
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
    """Affine heads on the features of one model: weights (members, text_width) and the common bias ()."""

    model: RewardModel
    weights: Tensor
    bias: Tensor

    @classmethod
    def fit(
        cls, model: RewardModel, pairs: Pairs, *, members: int = 8, ridge: float = 1e-2, seed: int = 0
    ) -> "HeadEnsemble":
        """Fit the members. ridge: pull towards the model's own head, in units of the pairs' mean loss."""
        if members < 2 or len(pairs) < 2:
            raise UserError(f"an ensemble needs 2 or more members and pairs, given {members} and {len(pairs)}")
        size = model.config.image_size
        own, bias = model.collapse_head()
        with torch.no_grad():
            differences = []
            for i in range(len(pairs)):
                feature = model.feature(model.vision_tokens(torch.stack(pairs.pixels(i, size))))
                differences.append(feature[0] - feature[1])
            d = torch.stack(differences)
        rng = np.random.default_rng(seed)
        weights = [
            _logistic(d[torch.from_numpy(rng.integers(0, len(d), len(d)))], own.float(), ridge) for _ in range(members)
        ]
        return cls(model, torch.stack(weights), bias)

    @torch.no_grad()
    def score_crops(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the members, (n,) each, of normalised crops (n, 3, S, S)."""
        scores = self.model.feature(self.model.vision_tokens(pixel_values)) @ self.weights.T + self.bias
        return scores.mean(1), scores.std(1)


def _logistic(differences: Tensor, own: Tensor, ridge: float) -> Tensor:
    weight = own.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-(differences @ weight)).mean() + ridge * (weight - own).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()
