"""Metrics against their definitions, written out by brute force."""

import math

import pytest
import torch
from scott import coverage, frechet_distance, prdc, vendi_score
from scott import metrics as m
from tenfold_shared.errors import UserError


def sets(n=60, d=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, d, generator=g) * 1.2 + 0.3


def brute_force(real, fake, k):
    def ball(points, i):
        return sorted(math.dist(points[i].tolist(), p.tolist()) for j, p in enumerate(points) if j != i)[k - 1]

    real_ball = [ball(real, i) for i in range(len(real))]
    fake_ball = [ball(fake, j) for j in range(len(fake))]
    apart = [[math.dist(r.tolist(), f.tolist()) for f in fake] for r in real]
    n = len(real)
    return {
        "precision": sum(any(apart[i][j] < real_ball[i] for i in range(n)) for j in range(n)) / n,
        "recall": sum(any(apart[i][j] < fake_ball[j] for j in range(n)) for i in range(n)) / n,
        "density": sum(apart[i][j] < real_ball[i] for i in range(n) for j in range(n)) / (k * n),
        "coverage": sum(any(apart[i][j] < real_ball[i] for j in range(n)) for i in range(n)) / n,
    }


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("d", [2, 40])
def test_prdc_is_its_definition(k, d):
    real, fake = sets(d=d)
    assert prdc(real, fake, k=k) == pytest.approx(brute_force(real, fake, k), abs=1e-6)


def test_prdc_in_chunks_is_prdc_whole(monkeypatch):
    real, fake = sets()
    whole = prdc(real, fake)
    monkeypatch.setattr(m, "CHUNK", 7)
    assert prdc(real, fake) == pytest.approx(whole, abs=1e-7)


def test_no_matrix_of_all_distances_is_made(monkeypatch):
    largest = 0
    cdist = torch.cdist

    def watched(a, b, **kwargs):
        nonlocal largest
        largest = max(largest, len(a) * len(b))
        return cdist(a, b, **kwargs)

    monkeypatch.setattr(torch, "cdist", watched)
    prdc(*sets(n=5000, d=2))
    assert largest == m.CHUNK * 5000


def test_extremes():
    real, _ = sets()
    same = prdc(real, real)
    assert same["coverage"] == same["precision"] == same["recall"] == 1.0
    away = prdc(real, real + 100)
    assert away == {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}
    one_mode = real[:1].expand(60, 3) + 1e-3 * sets(seed=1)[0]
    assert coverage(real, one_mode) < 0.5 < prdc(real, one_mode)["precision"]


def test_frechet_is_the_closed_form_of_gaussians():
    from scipy.linalg import sqrtm

    real, fake = (x.double() for x in sets(n=500, d=6))
    cov_real, cov_fake = torch.cov(real.T).numpy(), torch.cov(fake.T).numpy()
    gap = float((real.mean(0) - fake.mean(0)).square().sum())
    expected = gap + float((cov_real + cov_fake - 2 * sqrtm(cov_real @ cov_fake).real).trace())
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(real, real + 2) == pytest.approx(4 * 6, rel=1e-6)  # real + 2 is rounded to float32
    # Fewer samples than features: the covariances are singular, and tr(C + 9 C − 2 · 3 C) = 4 tr C.
    wide = sets(n=40, d=64)[0].double()
    expected = 4 * float(wide.mean(0).square().sum() + torch.cov(wide.T).trace())
    assert frechet_distance(wide, 3 * wide) == pytest.approx(expected, rel=1e-6)


def test_vendi_counts_different_samples():
    assert vendi_score(torch.eye(7)) == pytest.approx(7, rel=1e-6)
    assert vendi_score(torch.ones(9, 4)) == pytest.approx(1, rel=1e-6)
    few = torch.eye(3).repeat(20, 1)
    assert vendi_score(few) == pytest.approx(3, rel=1e-6)


def test_diversity_and_clip_score():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert m.pairwise_diversity(x) == pytest.approx(5.0)
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    assert m.clip_score(a, b) == pytest.approx(50.0)


def test_sliced_wasserstein_of_a_shift_in_one_dimension():
    x = torch.randn(500, 1)
    assert m.sliced_wasserstein(x, x + 0.7) == pytest.approx(0.7, rel=1e-4)
    assert m.sliced_wasserstein(x, x[torch.randperm(500)]) == 0.0


def test_errors():
    real, fake = sets()
    with pytest.raises(UserError, match="60 real and 59 fake samples"):
        prdc(real, fake[1:])
    with pytest.raises(UserError, match="more samples than neighbours"):
        prdc(real[:5], fake[:5], k=5)
    with pytest.raises(UserError, match="different size: 3 and 2"):
        coverage(real, fake[:, :2])
    with pytest.raises(UserError, match="fake features hold NaN"):
        coverage(real, fake.where(fake > -1, torch.nan))
    with pytest.raises(UserError, match="real features have shape"):
        coverage(real[0], fake)
    with pytest.raises(UserError, match="two samples or more"):
        frechet_distance(real[:1], fake)
    with pytest.raises(UserError, match="two samples or more"):
        m.pairwise_diversity(real[:1])
    with pytest.raises(UserError, match="expected pairs"):
        m.clip_score(real, fake[:3])
    with pytest.raises(UserError, match="equal numbers"):
        m.sliced_wasserstein(real, fake[:3])
