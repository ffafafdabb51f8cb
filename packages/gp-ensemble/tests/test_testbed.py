from pathlib import Path

import numpy as np
import pytest
import torch
from gp_ensemble import rendering, testbed
from gp_ensemble.errors import UserError
from gp_ensemble.pretraining import hog


def test_the_worlds_are_what_they_say() -> None:
    for name, count, classes in (("digits", 1797, 10), ("shapes", 3000, 20)):
        world = testbed.load_world(name)
        assert len(world.table) == len(world.images) == count and len(np.unique(world.table.labels)) == classes
        assert set(world.table) == {"clip", "simclr", "rot", "ae", "rand", "hog"}
        right = (world.zero_shot.predict(world.table["clip"]) == world.table.labels).mean()
        assert 1.5 / classes < right < 0.9  # the text model knows something, and not everything
    with pytest.raises(UserError, match="no world 'imagenet'"):
        testbed.load_world("imagenet")


def test_training_and_test_images_are_apart() -> None:
    world = testbed.load_world("digits")
    train, test = world.draw(16, 3)
    assert len(train) == 160 and len(test) == 600
    seen = {row.tobytes() for row in world.images.reshape(len(world.images), -1)[world.test_rows(3)]}
    assert len(seen) > 590
    everything = np.random.default_rng(3).permutation(1797)
    pool = {world.table["hog"][i].tobytes() for i in everything[:898]}
    assert all(row.tobytes() in pool for row in train["hog"])
    again = world.draw(16, 3)
    assert np.array_equal(again[0]["clip"], train["clip"]) and not np.array_equal(
        world.draw(16, 4)[0]["clip"], train["clip"]
    )


@pytest.mark.parametrize("name", testbed.WORLDS)
def test_the_recipe_runs_and_its_file_gives_the_same_features(name: str, tmp_path: Path) -> None:
    encoders = testbed.train(name, share=0.01)
    testbed.save_encoders(encoders, tmp_path / f"{name}.safetensors")
    loaded = testbed.load_encoders(tmp_path / f"{name}.safetensors")
    images = torch.rand(5, 1, testbed.SIDE[name], testbed.SIDE[name])
    before, after = encoders.features(images), loaded.features(images)
    assert list(before) == list(after)
    for key in before:
        np.testing.assert_allclose(after[key], before[key], atol=0.02, rtol=0.05)  # half precision
    assert (tmp_path / f"{name}.safetensors").stat().st_size < 3e6


def test_training_moves_the_weights_and_the_same_seed_gives_the_same() -> None:
    a, b = (testbed._recipes("digits")["ae"](lambda n: 3) for _ in range(2))
    fresh = testbed.pretraining.ConvNet(48)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a.parameters(), fresh.parameters(), strict=True))


def test_rendered_images_are_images() -> None:
    g = torch.Generator().manual_seed(0)
    sets = (rendering.glyphs(torch.arange(62), g), rendering.shapes(torch.arange(20), g), rendering.smooth_noise(7, g))
    for images, side in zip(sets, (16, 24, 24), strict=True):
        assert images.shape[1:] == (1, side, side) and float(images.min()) >= 0 and float(images.max()) <= 1
        assert float(images.flatten(1).std(1).min()) > 0.01


def test_hog_sees_edges_and_not_brightness() -> None:
    stripes = torch.zeros(1, 1, 16, 16)
    stripes[..., ::4] = 0.5
    stripes[..., 1::4] = 0.5
    across = hog(stripes).reshape(8, 16)
    down = hog(stripes.mT).reshape(8, 16)
    assert int(across.sum(1).argmax()) == 0 and int(down.sum(1).argmax()) == 4
    torch.testing.assert_close(hog(stripes + 0.3), hog(stripes), atol=1e-5, rtol=0)
