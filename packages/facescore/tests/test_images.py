"""Reading pictures of every kind, and the arithmetic of crops."""

import numpy as np
import pytest
import torch
from facescore.errors import ImageError, InvalidBoxError
from facescore.images import crop_window, differentiable_crops, normalise, open_image, preprocess
from PIL import Image


def test_crop_is_the_published_formula_on_random_boxes():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        x1, y1 = rng.uniform(1, 150, 2)
        w, h = rng.uniform(3, 100, 2)
        x2, y2 = x1 + w, y1 + h
        x, y = int(x1 - 1), int(y1 - 1)
        width, height = int(x2 + 1) - x, int(y2 + 1) - y
        assert crop_window((x1, y1, x2, y2), (300, 300)) == (x, y, x + width, y + height)
        assert crop_window((x1, y1, x2, y2), (300, 300), compat="official") == (x, y, x + width, y + height)


def test_border_faces_are_kept_here_and_lost_in_the_original():
    assert crop_window((0, 5, 20, 25), (50, 50)) == (0, 4, 21, 26)
    assert crop_window((0, 5, 20, 25), (50, 50), compat="official") is None
    assert crop_window((30, 30, 50, 50), (50, 50)) == (29, 29, 50, 50)


def test_square_and_margin():
    assert crop_window((10, 10, 30, 50), (100, 100), crop="square") == (-0, 9, 41, 51)
    assert crop_window((20, 20, 40, 40), (100, 100), margin=0.5) == (9, 9, 51, 51)


def test_bad_boxes():
    for box, text in (
        ((5, 5, 5, 9), "empty"), ((9, 5, 5, 9), "empty"), ((60, 0, 70, 9), "outside"),
        ((0, 0, float("nan"), 3), "not four finite"), ((-9, -9, 0, 0), "outside"),
    ):  # fmt: skip
        with pytest.raises(InvalidBoxError, match=text):
            crop_window(box, (50, 50))
    with pytest.warns(UserWarning, match="clamped"):
        assert crop_window((-10, -10, 70, 70), (50, 50)) == (0, 0, 50, 50)


def test_preprocess_is_resize_crop_normalise():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    resized = image.resize((int(32 * 90 / 60), 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    expected = normalise(torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255)
    assert torch.equal(preprocess(image, 32), expected)


def test_differentiable_crop_is_near_and_has_a_gradient():
    image = Image.fromarray(np.random.default_rng(0).integers(80, 140, (60, 90, 3), dtype=np.uint8))
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)[None].requires_grad_()
    box = (11.0, 7.0, 52.0, 48.0)
    crop = differentiable_crops(pixels, [box], 24)
    assert (crop[0] - preprocess(image.crop(crop_window(box, image.size)), 24)).abs().max() < 0.02
    crop.sum().backward()
    assert pixels.grad[0, :, 7:48, 11:52].abs().min() > 0 and not pixels.grad[0, :, 55:].any()


def test_every_mode_becomes_rgb(picture, tmp_path):
    for mode, name in (("RGB", "a.png"), ("RGBA", "b.png"), ("L", "c.png"), ("LA", "d.png"), ("CMYK", "e.jpg")):
        assert open_image(picture(name, mode=mode)).mode == "RGB"
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red, green, blue = open_image(tmp_path / "red.jpg").getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60
    assert open_image(Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (100, 100, 100)
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)).save(tmp_path / "dark.tif")
    assert open_image(tmp_path / "dark.tif").getpixel((0, 0)) == (1, 1, 1)  # dark in 16 bits, not bright in 8
    assert open_image(Image.fromarray(np.full((4, 4), 0.4, dtype=np.float32))).getpixel((0, 0)) == (102, 102, 102)
    with pytest.raises(ImageError, match="NaN"):
        open_image(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)))


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 10, 20))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    turned = open_image(tmp_path / "turned.jpg")
    assert turned.size == (20, 40) and turned.getpixel((10, 2))[2] > 200 and turned.getpixel((10, 37))[0] > 200


def test_arrays_and_tensors():
    array = np.zeros((6, 5, 3), dtype=np.uint8)
    assert open_image(array).size == open_image(torch.zeros(3, 6, 5)).size == open_image(array[..., 0]).size == (5, 6)


def test_unreadable_images_are_named(picture, tmp_path):
    whole = picture("whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name in ("cut.png", "empty.png", "text.png", "moving.gif", "nowhere.png"):
        with pytest.raises(ImageError, match=name):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"cut\.png.*damaged"):
        open_image(Image.open(tmp_path / "cut.png"))  # PIL has read the header only
    for bad, text in (
        (torch.full((3, 2, 2), float("nan")), "NaN"), (torch.full((3, 2, 2), 7.0), "expected \\[0, 1\\]"),
        (np.zeros((2, 2, 2), np.uint8), "channels"), (np.zeros(3, np.uint8), "shape"), (7, "int"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=text):
            open_image(bad)
