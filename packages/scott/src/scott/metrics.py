"""How far samples are from data, and how much of the data they cover.

Precision, recall (Kynkäänniemi 2019), density and coverage (Naeem 2020) ask who lies inside whose ball around the k-th
neighbour; the Fréchet distance compares Gaussian fits; the Vendi score counts effectively different samples; sliced
Wasserstein compares quantiles along random lines. Distances are taken in chunks: no N × N matrix is ever held.
"""

import torch
from tenfold_shared.errors import UserError
from torch import Tensor

CHUNK = 2048
"""Rows of a block of distances."""


def _features(**named: Tensor) -> list[Tensor]:
    checked = []
    for name, value in named.items():
        if value.dim() != 2 or not len(value):
            raise UserError(f"{name} features have shape {tuple(value.shape)}, expected (samples, features)")
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{name} features hold NaN or infinity")
        checked.append(value.float())
    widths = {value.shape[1] for value in checked}
    if len(widths) > 1:
        raise UserError(f"features of different size: {' and '.join(str(v.shape[1]) for v in checked)}")
    return checked


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M). A matrix product loses small distances, and is worth it only for wide features."""
    exact = a.shape[1] <= 32
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance to the k-th nearest other point, (N)."""
    # The nearest of the k + 1 is the point itself.
    return torch.cat(
        [_distances(rows, points).topk(k + 1, largest=False).values[:, -1] for rows in points.split(CHUNK)]
    )


def prdc(real: Tensor, fake: Tensor, *, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage.

    real, fake: features (N, d), as many of one as of the other: all four depend on the numbers.
    k: neighbours that make a ball.

    precision: share of fake points inside some real ball. recall: share of real points inside some fake ball.
    density: real balls around a fake point, over k. coverage: share of real balls that hold a fake point.

    Raises UserError for sets of different number or feature size, N ≤ k, or features that are not finite.
    """
    real, fake = _features(real=real, fake=fake)
    if len(real) != len(fake):
        raise UserError(
            f"{len(real)} real and {len(fake)} fake samples", hint="coverage and density need equal numbers of both"
        )
    if k < 1 or len(real) <= k:
        raise UserError(f"{len(real)} samples with k = {k}, expected more samples than neighbours")
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    inside = torch.zeros(len(fake), dtype=torch.long, device=fake.device)
    recalled, covered = 0, 0
    for rows, radius in zip(real.split(CHUNK), real_radius.split(CHUNK), strict=True):
        apart = _distances(rows, fake)
        within = apart < radius[:, None]
        inside += within.sum(0)
        covered += int(within.any(1).sum())
        recalled += int((apart < fake_radius).any(1).sum())
    n = len(real)
    return {
        "precision": float((inside > 0).float().mean()),
        "recall": recalled / n,
        "density": float(inside.float().mean()) / k,
        "coverage": covered / n,
    }


def coverage(real: Tensor, fake: Tensor, *, k: int = 5) -> float:
    """Share of real points whose ball around the k-th real neighbour holds a fake point; errors as in `prdc`."""
    return prdc(real, fake, k=k)["coverage"]


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """‖m_r − m_f‖² + tr(C_r + C_f − 2 (C_r C_f)^½) of features (N, d); FID when they are Inception's pooled features.

    Raises UserError for fewer than two samples, different feature sizes, or features that are not finite.
    """
    real, fake = (value.double() for value in _features(real=real, fake=fake))
    if min(len(real), len(fake)) < 2:
        raise UserError("the Fréchet distance needs two samples or more of both sets")
    cov_real, cov_fake = (torch.atleast_2d(torch.cov(value.T)) for value in (real, fake))
    # tr (C_r C_f)^½ is the sum of the singular values of C_r^½ C_f^½; a root of C_r C_f itself would lose half the digits.
    cross = torch.linalg.svdvals(_root(cov_real) @ _root(cov_fake)).sum()
    gap = (real.mean(0) - fake.mean(0)).square().sum()
    return float(gap + cov_real.trace() + cov_fake.trace() - 2 * cross)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def vendi_score(features: Tensor) -> float:
    """Effective number of different samples: exp of the entropy of the cosine kernel's eigenvalues. features: (N, d)."""
    (features,) = _features(given=features)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    # The N × N kernel and the d × d one have the same non-zero eigenvalues.
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    values = (torch.linalg.eigvalsh(gram) / len(unit)).clamp(min=0)
    return float(torch.special.entr(values).sum().exp())


def pairwise_diversity(features: Tensor) -> float:
    """Mean distance between different samples (N, d); of one prompt's images, its diversity."""
    (features,) = _features(given=features)
    n = len(features)
    if n < 2:
        raise UserError("diversity needs two samples or more")
    return float(sum(_distances(rows, features).double().sum() for rows in features.split(CHUNK))) / (n * (n - 1))


def clip_score(image_features: Tensor, text_features: Tensor) -> float:
    """100 max(cos, 0), averaged over pairs. image_features, text_features: (N, d)."""
    image, text = _features(image=image_features, text=text_features)
    if len(image) != len(text):
        raise UserError(f"{len(image)} images and {len(text)} texts, expected pairs")
    return float(100 * torch.cosine_similarity(image, text).clamp(min=0).mean())


def sliced_wasserstein(real: Tensor, fake: Tensor, *, projections: int = 128, seed: int = 0) -> float:
    """2-Wasserstein distance along random lines, root of the mean square over lines. real, fake: (N, d), equal N."""
    real, fake = _features(real=real, fake=fake)
    if len(real) != len(fake):
        raise UserError(f"{len(real)} real and {len(fake)} fake samples, expected equal numbers")
    generator = torch.Generator().manual_seed(seed)
    lines = torch.nn.functional.normalize(torch.randn(real.shape[1], projections, generator=generator), dim=0)
    lines = lines.to(real.device)
    apart = (real @ lines).sort(0).values - (fake @ lines).sort(0).values
    return float(apart.square().mean().sqrt())
