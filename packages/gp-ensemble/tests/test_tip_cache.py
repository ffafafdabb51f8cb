from pathlib import Path

import pytest
import torch
from gp_ensemble import CacheError, GPEnsembleClassifier
from gp_ensemble.tip_cache import read_tip_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    y, y_test = torch.arange(12) % 3, torch.arange(30) % 3
    keys = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator)[y] + 0.1, dim=1)
    tests = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator.manual_seed(0))[y_test] + 0.1, dim=1)
    torch.save(keys.mT.half(), tmp_path / "keys_4shots.pt")
    torch.save(torch.nn.functional.one_hot(y, 3).half(), tmp_path / "values_4shots.pt")
    torch.save(tests.half(), tmp_path / "test_f.pt")
    torch.save(y_test, tmp_path / "test_l.pt")
    return tmp_path


def test_a_cache_becomes_tables(cache: Path) -> None:
    tables = read_tip_cache(cache)
    assert tables["train"]["clip"].shape == (12, 8) and tables["train"].labels.tolist() == [0, 1, 2] * 4
    clf = GPEnsembleClassifier().fit(tables["train"], tables["train"].labels)
    assert clf.score(tables["test"], tables["test"].labels) == 1.0


def test_damaged_caches_are_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"keys_16shots\.pt' does not exist"):
        read_tip_cache(cache, shots=16)
    with pytest.raises(CacheError, match="does not exist"):
        read_tip_cache(tmp_path / "nothing")
    torch.save(torch.zeros(3, 2), cache / "values_4shots.pt")
    with pytest.raises(CacheError, match=r"expected \(d, n\)"):
        read_tip_cache(cache)
    (cache / "values_4shots.pt").write_bytes(b"junk")
    with pytest.raises(CacheError, match=r"values_4shots\.pt' cannot be read"):
        read_tip_cache(cache)
    torch.save({"a": 1}, cache / "values_4shots.pt")
    with pytest.raises(CacheError, match="expected a tensor"):
        read_tip_cache(cache)
    (cache / "keys_4shots.pt").unlink()
    with pytest.raises(CacheError, match="no shots"):
        read_tip_cache(cache)
