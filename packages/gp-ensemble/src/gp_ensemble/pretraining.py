"""Small encoders, each trained on another task, as a stand-in for a zoo of pre-trained models.

    clip     images against captions (InfoNCE, arXiv 2103.00020)       the only one with text
    simclr   two views of one image against others (arXiv 2002.05709)
    rot      which way up (arXiv 1803.07728)
    ae       denoising auto-encoder
    hog      histograms of oriented gradients, nothing trained
    rand     the same network, untrained

A source is a function from (count, generator) to images (count, 1, side, side), and to captions' class numbers for
`clip`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import trange

Source = Callable[[int, torch.Generator], Tensor]
Labelled = Callable[[torch.Generator], tuple[Tensor, Tensor]]


class ConvNet(nn.Sequential):
    """Three 3x3 convolutions (24, 48, 96; stride 1, 2, 2), 2x2 adaptive pooling, a linear layer to `dimensions`."""

    def __init__(self, dimensions: int = 64):
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 24, 1), (24, 48, 2), (48, 96, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(384, dimensions))
        self.dimensions = dimensions


class TextTower(nn.Module):
    """Mean of word embeddings (96), then an MLP to 64. words: the vocabulary; others are left out."""

    def __init__(self, words: Sequence[str]):
        super().__init__()
        self.words = list(words)
        self.embedding = nn.EmbeddingBag(len(self.words), 96, mode="mean")
        self.head = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 64))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, captions: Sequence[str]) -> Tensor:
        """(captions, 64)."""
        position = {word: i for i, word in enumerate(self.words)}
        bags = [[position[w] for w in caption.split() if w in position] for caption in captions]
        offsets = torch.tensor([0, *[len(bag) for bag in bags[:-1]]]).cumsum(0)
        return self.head(self.embedding(torch.tensor([i for bag in bags for i in bag]), offsets))


def vocabulary(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every word of the captions, sorted."""
    return sorted({word for name in names for template in templates for word in template.format(name).split()})


def train_clip(
    draw: Labelled, names: Sequence[str], templates: Sequence[str], *, steps: int, seed: int = 0
) -> tuple[ConvNet, TextTower]:
    """Image and text towers by InfoNCE. draw: generator to (images, class numbers), each class once at most."""
    generator = _start(seed)
    image, text = ConvNet(), TextTower(vocabulary(names, templates))

    def loss() -> Tensor:
        total = torch.zeros(())
        for _ in range(2):
            images, numbers = draw(generator)
            picks = torch.randint(0, len(templates), (len(numbers),), generator=generator).tolist()
            captions = [templates[t].format(names[i]) for t, i in zip(picks, numbers.tolist(), strict=True)]
            a, b = functional.normalize(image(images), dim=1), functional.normalize(text(captions), dim=1)
            logits = text.log_scale.exp() * a @ b.mT
            # Two captions of one class are both right.
            same = (numbers[:, None] == numbers).float()
            target = same / same.sum(1, keepdim=True)
            total = total + functional.cross_entropy(logits, target) + functional.cross_entropy(logits.mT, target)
        return total / 4

    _train([image, text], loss, steps, "clip")
    return image.eval(), text.eval()


def train_simclr(
    source: Source, augment: Callable[[Tensor, torch.Generator], Tensor], *, steps: int, seed: int = 1
) -> ConvNet:
    """Two augmented views of 96 images against one another at temperature 0.2."""
    generator = _start(seed)
    encoder, head = ConvNet(), nn.Sequential(nn.ReLU(), nn.Linear(64, 64))

    def loss() -> Tensor:
        images = source(96, generator)
        views = torch.cat([augment(images, generator), augment(images, generator)])
        z = functional.normalize(head(encoder(views)), dim=1)
        similarity = (z @ z.mT / 0.2).fill_diagonal_(-1e9)
        return functional.cross_entropy(similarity, torch.arange(192).roll(96))

    _train([encoder, head], loss, steps, "simclr")
    return encoder.eval()


def train_rotation(source: Source, *, steps: int, seed: int = 2) -> ConvNet:
    """By which quarter turns 128 images were rotated."""
    generator = _start(seed)
    encoder, head = ConvNet(), nn.Sequential(nn.ReLU(), nn.Linear(64, 4))

    def loss() -> Tensor:
        images = source(128, generator)
        turns = torch.arange(128) % 4
        turned = torch.stack([torch.rot90(i, int(k), (1, 2)) for i, k in zip(images, turns, strict=True)])
        return functional.cross_entropy(head(encoder(turned)), turns)

    _train([encoder, head], loss, steps, "rot")
    return encoder.eval()


def train_autoencoder(source: Source, *, side: int, steps: int, seed: int = 3) -> ConvNet:
    """A 48-dimensional code of 96 noisy images from which the clean ones are rebuilt."""
    generator = _start(seed)
    encoder = ConvNet(48)
    decoder = nn.Sequential(nn.Linear(48, 192), nn.ReLU(), nn.Linear(192, side * side))

    def loss() -> Tensor:
        clean = source(96, generator)
        noisy = clean + 0.2 * torch.randn(clean.shape, generator=generator)
        return functional.mse_loss(decoder(encoder(noisy)), clean.flatten(1))

    _train([encoder, decoder], loss, steps, "ae")
    return encoder.eval()


def untrained(dimensions: int = 96, *, seed: int = 4) -> ConvNet:
    """A network with its first random weights."""
    _start(seed)
    return ConvNet(dimensions).eval()


def hog(images: Tensor) -> Tensor:
    """Histograms of oriented gradients in 4-pixel cells, 8 orientations, each cell's block normalised: (n,
    cells * 8)."""
    y = functional.pad(images, (0, 0, 1, 1), mode="replicate").diff(dim=2)
    x = functional.pad(images, (1, 1, 0, 0), mode="replicate").diff(dim=3)
    y, x = (y[:, :, 1:] + y[:, :, :-1]) / 2, (x[..., 1:] + x[..., :-1]) / 2
    magnitude = (x**2 + y**2).sqrt()
    angle = (torch.atan2(y, x) % math.pi) * 8 / math.pi
    centre = torch.arange(8).reshape(1, 8, 1, 1)
    distance = (angle - centre).abs()
    share = (1 - torch.minimum(distance, 8 - distance)).clamp_min(0)
    cells = functional.avg_pool2d(share * magnitude, 4)
    return (cells / (cells.norm(dim=1, keepdim=True) + 0.05)).flatten(1)


def _start(seed: int) -> torch.Generator:
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def _train(modules: Sequence[nn.Module], loss: Callable[[], Tensor], steps: int, name: str) -> None:
    """AdamW at 2e-3 with a cosine to zero."""
    parameters = [p for module in modules for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in trange(steps, desc=name, leave=False):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()
