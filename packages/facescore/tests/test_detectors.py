"""Detectors: the offline default on a real photograph, and every way of not having one."""

import io
import json

import numpy as np
import pytest
from facescore.detectors import Boxes, Detector, Dlib, FullImage, SkimageLBP, make_detector
from facescore.errors import DetectorUnavailableError, InvalidBoxError
from facescore.images import open_image
from facescore.reward.scorer import load_named
from PIL import Image
from skimage import data
from tenfold_shared.errors import UserError


@pytest.fixture(scope="module")
def astronaut():
    return Image.fromarray(data.astronaut())


@pytest.mark.parametrize("kind", [SkimageLBP, Dlib])
def test_finds_the_astronaut(astronaut, kind):
    detector = kind()
    assert isinstance(detector, Detector) and not detector.calibrated
    (found,) = detector.detect(astronaut)
    x1, y1, x2, y2 = found.box
    assert abs((x1 + x2) / 2 - 221) < 20 and abs((y1 + y2) / 2 - 117) < 25 and 60 < x2 - x1 < 130


def stored(image, kind="JPEG", **options):
    """The image as it comes back from a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def turned(image):
    exif = image.getexif()
    exif[274] = 6  # to be shown turned by a quarter
    return stored(image.rotate(90, expand=True), exif=exif)


@pytest.mark.parametrize(
    "version",
    [
        lambda a: a, lambda a: a.convert("L"), lambda a: stored(a.convert("RGBA"), "PNG"), lambda a: a.convert("CMYK"),
        lambda a: stored(a.convert("CMYK")), lambda a: stored(a.convert("CMYK"), quality=95), turned,
        *(lambda a, q=q: stored(a, quality=q) for q in (10, 30, 50, 75, 95)),
        lambda a: Image.fromarray(np.asarray(a.convert("L")).astype(np.uint16) * 257),
        *(lambda a, side=side: a.resize((side, side)) for side in (256, 700)),
    ],
)  # fmt: skip
def test_the_one_face_in_every_version_of_the_file(astronaut, version):
    image = open_image(version(astronaut))
    (found,) = SkimageLBP().detect(image)
    x1, y1, x2, y2 = np.array(found.box) * 512 / image.width
    assert abs((x1 + x2) / 2 - 224) < 10 and abs((y1 + y2) / 2 - 118) < 15 and 75 < x2 - x1 < 130


def test_the_second_look_keeps_faces_and_lets_no_other_picture_pass():
    def framed(array):
        grey = Image.fromarray((np.clip(array, 0, 1) * 255).astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
        return Image.fromarray(np.pad(np.asarray(grey), 24, mode="edge"))

    samples, detector = data.lfw_subset(), SkimageLBP()
    found = [len(detector.detect(framed(samples[i]))) for i in (*range(0, 100, 4), *range(100, 200, 4))]
    assert sum(n == 1 for n in found[:25]) >= 20 and not any(found[25:])


def test_faces_at_the_border_and_many_faces(astronaut):
    for window in ((172, 40, 372, 240), (80, 40, 278, 240), (120, 62, 320, 262), (120, 0, 320, 172)):
        assert len(SkimageLBP().detect(astronaut.crop(window))) == 1
    face = astronaut.crop((130, 20, 320, 210))
    crowd = Image.new("RGB", (570, 380))
    for i in range(6):
        crowd.paste(face, (190 * (i % 3), 190 * (i // 3)))
    assert len(SkimageLBP().detect(crowd)) == 6


def test_two_faces_and_none(astronaut):
    face = astronaut.crop((130, 20, 320, 210))
    two = Image.new("RGB", (380, 190))
    two.paste(face, (0, 0))
    two.paste(face, (190, 0))
    assert len(SkimageLBP().detect(two)) == 2
    assert SkimageLBP().detect(Image.new("RGB", (64, 64))) == SkimageLBP().detect(Image.new("RGB", (8, 8))) == []


def test_full_image_and_boxes(picture, tmp_path):
    path = picture("a.png", (40, 30))
    assert FullImage().detect(load_named(path))[0].box == (0, 0, 40, 30)
    (tmp_path / "boxes.json").write_text(json.dumps({"a.png": [[1, 2, 30, 20]]}))
    detector = make_detector(f"boxes:{tmp_path / 'boxes.json'}")
    assert detector.detect(load_named(path))[0].box == (1, 2, 30, 20)
    assert detector.detect(load_named(picture("b.png"))) == []


def test_absent_detectors_say_what_to_do(tmp_path):
    for name in ("mtcnn", "yunet", "retinaface", "mediapipe", f"boxes:{tmp_path / 'no.json'}"):
        with pytest.raises(DetectorUnavailableError) as caught:
            make_detector(name)
        assert "does not exist" in str(caught.value) or "pass" in str(caught.value)
    with pytest.raises(UserError, match="expected one of skimage-lbp"):
        make_detector("eyes")
    with pytest.raises(UserError, match="has no detect"):
        make_detector(np.zeros(3))  # type: ignore[arg-type]
    (tmp_path / "bad.json").write_text("{")
    for broken in (tmp_path / "bad.json", {"a": [[1, 2]]}, {"a": [["x"] * 4]}):
        with pytest.raises(InvalidBoxError):
            Boxes(broken)
