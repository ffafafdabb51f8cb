from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # the matrices are small, and another thread would only wait

Problem = dict[str, Any]


@pytest.fixture
def problem() -> Problem:
    """Three encoders, four classes, six images each; zero-shot logits from the first encoder; thirty more images."""
    rng = np.random.default_rng(0)
    classes, dims = 4, {"clip": 7, "dino": 9, "mae": 5}
    centres = {name: rng.normal(size=(classes, d)) for name, d in dims.items()}

    def draw(numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {n: c[numbers] + rng.normal(size=(len(numbers), c.shape[1])) for n, c in centres.items()}

    y, y_test = rng.permutation(np.repeat(np.arange(classes), 6)), rng.integers(0, classes, 30)
    X, X_test = draw(y), draw(y_test)
    text = centres["clip"].T + 0.5 * rng.normal(size=centres["clip"].T.shape)
    return {
        "X": X,
        "y": np.asarray(["cat", "dog", "fox", "owl"])[y],
        "z": X["clip"] @ text,
        "X_test": X_test,
        "y_test": np.asarray(["cat", "dog", "fox", "owl"])[y_test],
        "z_test": X_test["clip"] @ text,
        "text": text,
    }
