import pytest
import torch
from mlcm.card import report_card, small_pixels
from mlcm.metrics import coverage, frechet_distance, sliced_wasserstein
from tenfold_shared.errors import UserError


def draw(seed: int, count: int = 2000, dims: int = 2) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))


def test_equal_sets():
    a = draw(0)
    assert sliced_wasserstein(a, a[torch.randperm(2000)]) == pytest.approx(0, abs=1e-6)
    assert coverage(a[:500], a[:500]) == 1.0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_a_shift_is_measured_exactly():
    a = draw(0)
    moved = a + torch.tensor([0.6, 0.8])
    # Over directions of the plane the mean of the squared projections of a unit vector is one half.
    assert sliced_wasserstein(a, moved) == pytest.approx(0.5**0.5, rel=1e-3)
    assert frechet_distance(a, moved) == pytest.approx(1.0, rel=1e-4)


def test_frechet_of_scaled_gaussians():
    a = draw(0, 50_000, 3)
    assert frechet_distance(a, 2 * a) == pytest.approx(
        float(a.var(0).sum()) + float(a.mean(0).square().sum()), rel=1e-4
    )


def test_coverage_sees_a_missing_half():
    real = torch.cat([draw(0, 400), draw(1, 400) + 50])
    assert coverage(real, draw(2, 800)) == pytest.approx(0.5, abs=0.06)


def test_report_card():
    teacher = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    table = report_card(
        lambda k: teacher if k == 8 else torch.zeros_like(teacher), teacher, steps=(1, 8), features=small_pixels,
        rewards={"brightness": lambda images, prompts: images.mean((1, 2, 3))},
    )  # fmt: skip
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["teacher"]["Fréchet"] is None and rows["8"]["Fréchet"] == pytest.approx(0, abs=1e-4)
    assert rows["8"]["coverage"] == 1.0 and rows["1"]["coverage"] < 0.5 and rows["1"]["brightness"] == 0
    assert rows["8"]["brightness"] == pytest.approx(rows["teacher"]["brightness"])


def test_report_card_refuses():
    with pytest.raises(UserError, match="3 reference images, expected 8"):
        report_card(lambda k: torch.zeros(3), torch.zeros(3, 3, 8, 8), features=small_pixels)
    with pytest.raises(UserError, match="not finite"):
        report_card(lambda k: torch.zeros(9), torch.full((9, 3, 8, 8), float("nan")), features=small_pixels)
