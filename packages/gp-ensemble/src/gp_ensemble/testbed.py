"""Two small worlds that need no download: images, six frozen encoders, zero-shot logits, and images from elsewhere.

digits   scikit-learn's 1797 real 8x8 digits; the encoders have seen only rendered characters and shapes
shapes   3000 drawn 24x24 images of 20 classes on clutter; "clip" has seen a quarter of that clutter, and is weak

    python -m gp_ensemble.testbed FOLDER      trains the encoders anew, about two minutes; the results come with the
    package

The encoders and their weights are the same for every seed; a seed draws the split and the labelled images.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor
from torch.nn import functional

from gp_ensemble import pretraining, rendering
from gp_ensemble.features import FeatureTable, few_shot_indices
from gp_ensemble.pretraining import ConvNet, TextTower
from gp_ensemble.zero_shot import ZeroShotClassifier

WORLDS = ("digits", "shapes")
TEMPLATES = {
    "digits": ("a photo of the {}", "a picture of the {}", "the {}", "a drawing of the {}"),
    "shapes": ("a photo of a {}", "a picture of a {}", "a {}", "a drawing of a {}"),
}
SIDE = {"digits": 16, "shapes": 24}
TESTED = 600


@dataclass(frozen=True)
class World:
    """Features of a data set under every encoder, its zero-shot classifier, and images of other kinds."""

    name: str
    images: np.ndarray
    """(n, side, side) in [0, 1]."""
    table: FeatureTable
    zero_shot: ZeroShotClassifier
    elsewhere: dict[str, FeatureTable]
    """Out-of-distribution sets by name."""

    def draw(self, shots: int, seed: int) -> tuple[FeatureTable, FeatureTable]:
        """Labelled training images and 600 test images. Half of the data is the pool that training images come from."""
        order = np.random.default_rng(seed).permutation(len(self.table))
        half = len(order) // 2
        pool, test = order[:half], order[half : half + TESTED]
        labels = self.table.labels
        assert labels is not None
        return self.table[pool[few_shot_indices(labels[pool], shots, seed=seed)]], self.table[test]

    def test_rows(self, seed: int) -> np.ndarray:
        """Which images `draw` tests on."""
        order = np.random.default_rng(seed).permutation(len(self.table))
        return order[len(order) // 2 :][:TESTED]


@dataclass
class Encoders:
    """The trained networks of one world."""

    networks: dict[str, ConvNet]
    text: TextTower

    def features(self, images: Tensor) -> dict[str, np.ndarray]:
        """Encoder to (n, d_i), float32. images: (n, 1, side, side)."""
        with torch.inference_mode():
            found = {name: torch.cat([net(b) for b in images.split(500)]) for name, net in self.networks.items()}
        return {name: values.numpy() for name, values in {**found, "hog": pretraining.hog(images)}.items()}

    def zero_shot(self, names: Sequence[str], templates: Sequence[str], called: Sequence[str]) -> ZeroShotClassifier:
        """names: what captions say; called: the class names."""
        with torch.inference_mode():
            columns = [functional.normalize(self.text([t.format(n) for t in templates]), dim=1).mean(0) for n in names]
            weights = functional.normalize(torch.stack(columns, dim=1), dim=0)
            return ZeroShotClassifier(called, weights.numpy(), float(self.text.log_scale.exp()), "clip")


def train(world: str, *, share: float = 1.0) -> Encoders:
    """Train the encoders of a world from nothing. share: of the steps, for trying the recipe out."""

    def steps(count: int) -> int:
        return max(int(count * share), 2)

    recipes = _recipes(world)
    clip, text = recipes.pop("clip")(steps)
    return Encoders({"clip": clip, **{name: recipe(steps) for name, recipe in recipes.items()}}, text)


def _recipes(world: str) -> dict[str, Callable[[Callable[[int], int]], Any]]:
    """Encoder to how it is trained, given how many of its steps to make."""

    def letters(n: int, g: torch.Generator) -> Tensor:
        return rendering.glyphs(torch.randint(10, 62, (n,), generator=g), g)

    def sharp_letters(n: int, g: torch.Generator) -> Tensor:
        return rendering.glyphs(torch.randint(10, 62, (n,), generator=g), g, side=32, low=None)

    def letters_and_shapes(n: int, g: torch.Generator) -> Tensor:
        return torch.cat([letters(n // 2, g), _shapes(n - n // 2, g, side=16)])

    def every_character(g: torch.Generator) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(len(rendering.CHARACTERS))
        return rendering.glyphs(numbers, g), numbers

    def large_shapes(n: int, g: torch.Generator) -> Tensor:
        return functional.interpolate(_shapes(n, g), size=32, mode="bilinear", align_corners=False)

    def upright_shapes(n: int, g: torch.Generator) -> Tensor:
        return _shapes(n, g, upright=True)

    def tidy_shapes(g: torch.Generator) -> tuple[Tensor, Tensor]:
        numbers = torch.randint(0, len(rendering.SHAPE_CLASSES), (80,), generator=g)
        return rendering.shapes(numbers, g, clutter=0.1), numbers

    names, templates = rendering.character_names(), TEMPLATES.get(world, ())
    low, side = {"digits": 8}.get(world), SIDE.get(world, 0)

    def augment(images: Tensor, g: torch.Generator) -> Tensor:
        return rendering.moved(images, g, side=side, low=low)

    if world == "digits":
        return {
            "clip": lambda steps: pretraining.train_clip(every_character, names, templates, steps=steps(350)),
            "simclr": lambda steps: pretraining.train_simclr(sharp_letters, augment, steps=steps(250)),
            "rot": lambda steps: pretraining.train_rotation(letters, steps=steps(220)),
            "ae": lambda steps: pretraining.train_autoencoder(letters_and_shapes, side=side, steps=steps(250)),
            "rand": lambda steps: pretraining.untrained(),
        }
    if world == "shapes":
        called = rendering.SHAPE_CLASSES
        return {
            "clip": lambda steps: pretraining.train_clip(tidy_shapes, called, templates, steps=steps(300)),
            "simclr": lambda steps: pretraining.train_simclr(large_shapes, augment, steps=steps(150)),
            "rot": lambda steps: pretraining.train_rotation(upright_shapes, steps=steps(150)),
            "ae": lambda steps: pretraining.train_autoencoder(_shapes, side=side, steps=steps(150)),
            "rand": lambda steps: pretraining.untrained(),
        }
    raise UserError(f"no world '{world}'", hint=f"there are {', '.join(WORLDS)}")


def _shapes(n: int, g: torch.Generator, *, side: int = 24, upright: bool = False) -> Tensor:
    return rendering.shapes(torch.randint(0, 20, (n,), generator=g), g, side=side, upright=upright)


def save_encoders(encoders: Encoders, path: Path) -> None:
    """Write the weights in half precision, with the vocabulary."""
    import json

    from safetensors.torch import save_file

    modules: dict[str, torch.nn.Module] = {**encoders.networks, "text": encoders.text}
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    halves = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()}
    dimensions = {name: network.dimensions for name, network in encoders.networks.items()}
    with replace_atomically(path) as partial:
        save_file(halves, partial, {"words": json.dumps(encoders.text.words), "dimensions": json.dumps(dimensions)})


def load_encoders(path: Path) -> Encoders:
    """Read what `save_encoders` wrote."""
    import json

    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        record = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    networks = {name: ConvNet(d) for name, d in json.loads(record["dimensions"]).items()}
    text = TextTower(json.loads(record["words"]))
    modules: dict[str, torch.nn.Module] = {**networks, "text": text}
    for name, module in modules.items():
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in own.items()})
        module.eval()
    return Encoders(networks, text)


@functools.cache
def load_world(name: str) -> World:
    """A world with the encoders that come with the package. Raises UserError for another name."""
    if name not in WORLDS:
        raise UserError(f"no world '{name}'", hint=f"there are {', '.join(WORLDS)}")
    return make_world(name, load_encoders(Path(str(files("gp_ensemble") / "weights" / f"{name}.safetensors"))))


def make_world(name: str, encoders: Encoders) -> World:
    """A world seen through given encoders."""
    generator = torch.Generator().manual_seed(1234)
    side = SIDE[name]
    if name == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        small = torch.from_numpy(bunch.images).float()[:, None] / 16
        images = functional.interpolate(small, size=side, mode="bilinear", align_corners=False)
        called, captions = list(rendering.DIGITS), rendering.character_names()[:10]
        numbers = bunch.target
        others = {
            "letters": rendering.glyphs(torch.randint(10, 62, (600,), generator=generator), generator),
            "shapes": _shapes(600, generator, side=side),
        }
    else:
        numbers = np.arange(3000) % 20
        images = rendering.shapes(torch.from_numpy(numbers), generator)
        called = captions = list(rendering.SHAPE_CLASSES)
        others = {
            "characters": rendering.glyphs(
                torch.randint(0, 62, (600,), generator=generator), generator, side=side, low=None
            ),
            "noise": rendering.smooth_noise(600, generator, side=side),
        }
    zero_shot = encoders.zero_shot(captions, TEMPLATES[name], called)

    def table(pictures: Tensor, labels: np.ndarray | None = None) -> FeatureTable:
        features = encoders.features(pictures)
        return FeatureTable(features, labels, [], zero_shot.logits(features["clip"]), called)

    labels = np.asarray(called)[numbers]
    return World(
        name,
        images[:, 0].numpy(),
        table(images, labels),
        zero_shot,
        {other: table(pictures) for other, pictures in others.items()},
    )


if __name__ == "__main__":
    for world in WORLDS:
        save_encoders(train(world), Path(sys.argv[1]) / f"{world}.safetensors")
