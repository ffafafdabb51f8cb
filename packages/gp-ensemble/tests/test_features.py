import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from gp_ensemble import CacheError, FeatureTable, few_shot_indices
from gp_ensemble.errors import FeatureError, UserError
from gp_ensemble.features import Normaliser


def table() -> FeatureTable:
    rng = np.random.default_rng(0)
    features = {"clip": rng.normal(size=(6, 3)).astype(np.float32), "dino": rng.normal(size=(6, 2)).astype(np.float32)}
    return FeatureTable(
        features, np.asarray(list("aabbcc")), [f"{i}.png" for i in range(6)], np.eye(6)[:, :3], list("abc")
    )


def test_rows_and_encoders() -> None:
    whole = table()
    part = whole[np.asarray([4, 1])]
    assert part.paths == ["4.png", "1.png"] and part.labels.tolist() == ["c", "a"]
    assert np.array_equal(part["clip"], whole["clip"][[4, 1]]) and np.array_equal(
        part.prior_logits, np.eye(6)[[4, 1], :3]
    )
    assert len(whole) == 6 and whole.shape == (6, 5) and list(whole) == ["clip", "dino"]
    assert whole[2].paths == ["2.png"] and len(whole[1:3]) == 2
    np.testing.assert_allclose(np.linalg.norm(whole.concatenated(), axis=1), np.sqrt(2), rtol=1e-6)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    whole = table()
    whole.fingerprint = {"clip": "abc"}
    whole.save(tmp_path / "features.safetensors")
    back = FeatureTable.load(tmp_path)
    assert list(back) == list(whole) and back.paths == whole.paths and back.class_names == whole.class_names
    assert all(np.array_equal(back[n], whole[n]) for n in whole) and np.array_equal(back.labels, whole.labels)
    assert np.array_equal(back.prior_logits, whole.prior_logits) and back.fingerprint == whole.fingerprint


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="does not exist"):
        FeatureTable.load(tmp_path / "features.safetensors")
    for content in (b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "):
        (tmp_path / "features.safetensors").write_bytes(content)
        with pytest.raises(CacheError, match=r"features\.safetensors' is damaged"):
            FeatureTable.load(tmp_path)
    with pytest.raises(UserError, match="different numbers of rows"):
        FeatureTable({"a": np.zeros((2, 1))}, labels=np.zeros(3))


def test_normalised_rows_are_centred_unit_vectors_and_centring_can_be_undone() -> None:
    raw = {"a": np.random.default_rng(0).normal(size=(20, 5)) + 3}
    normaliser, u = Normaliser.fit(raw, dtype=torch.float64)
    torch.testing.assert_close(u["a"].norm(dim=1), torch.ones(20, dtype=torch.float64))
    assert float(u["a"].mean(0).norm()) < 0.2
    units = torch.as_tensor(raw["a"] / np.linalg.norm(raw["a"], axis=1, keepdims=True))
    torch.testing.assert_close(normaliser.uncentred("a", u["a"]), units)
    torch.testing.assert_close(normaliser(raw, dtype=torch.float64)["a"], u["a"])


def test_centring_is_left_out_where_it_would_erase() -> None:
    for raw in (np.ones((1, 4)), np.ones((3, 4))):
        normaliser, u = Normaliser.fit({"a": raw}, dtype=torch.float64)
        assert normaliser.means["a"] is None and float(u["a"][0].norm()) == pytest.approx(1.0)
    assert Normaliser.fit({"a": np.eye(3)}, center=False, dtype=torch.float64)[0].means["a"] is None


def test_huge_values_are_no_infinity_and_shapes_are_checked() -> None:
    _, u = Normaliser.fit({"a": np.asarray([[3e38, 3e38], [1.0, -1.0]])}, dtype=torch.float32)
    assert torch.isfinite(u["a"]).all()
    with pytest.raises(FeatureError, match="expected"):
        Normaliser.fit({"a": np.zeros(3)}, dtype=torch.float64)


def test_few_shots_are_drawn_without_replacement() -> None:
    y = np.repeat(["a", "b"], [10, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = few_shot_indices(y, 3, seed=1)
    assert len(set(chosen.tolist())) == 6 and (y[chosen] == "a").sum() == 3
    assert np.array_equal(chosen, few_shot_indices(y, 3, seed=1))
    with pytest.warns(UserWarning, match=r"fewer than 5 images in class b \(3\)"):
        assert len(few_shot_indices(y, 5)) == 8
    with pytest.raises(UserError, match="shots is 0"):
        few_shot_indices(y, 0)
