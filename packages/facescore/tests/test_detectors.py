"""Detectors: the offline default on a real photograph, and every way of not having one."""

import json

import numpy as np
import pytest
from facescore.detectors import Boxes, Detector, Dlib, FullImage, SkimageLBP, make_detector
from facescore.errors import DetectorUnavailableError, InvalidBoxError
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
