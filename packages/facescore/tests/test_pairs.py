"""The pair format, its importers, and the builder on the drawn world and on a real inpainting pipeline."""

import io
import json

import numpy as np
import pytest
import torch
from facescore import InpaintPairBuilder, PairDataset
from facescore.errors import InvalidBoxError, PairFormatError
from facescore.pairs.builder import face_mask, hull_mask, paste, read_images
from facescore.pairs.dataset import FILE, import_imagereward, import_pickapic, read_rankings, split_by_source
from facescore.testbed import Templates, new_pipeline, plain_box, to_pil, write_world
from PIL import Image
from tenfold_shared.errors import UserError


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path / "w", 8)
    return tmp_path / "w"


def plain_items(n=4):
    templates = Templates.all()
    rows = np.flatnonzero(templates.kinds == 0)[:n]
    images = to_pil(templates.pixels(rows))
    return [
        {"id": f"f{i}", "image": image, "prompt": "a face", "boxes": [plain_box(i % 4)]}
        for i, image in enumerate(images)
    ]


def builder(**options):
    torch.manual_seed(0)
    settings = {"min_face": 8, "missing": "ignore", "options": {"num_inference_steps": 3}, **options}
    return InpaintPairBuilder(new_pipeline((16, 24)), "full-image", **settings)


def test_reads_and_splits_by_source(world):
    pairs = PairDataset.read(world / "pairs")
    win, lose = pairs.crops(0)
    assert len(pairs) == 8 and win.size == lose.size and pairs.mask(0).getextrema() == (0, 255)
    doubled = PairDataset(pairs.root, [*pairs.records, *pairs.records])
    kept, held = split_by_source(doubled, 0.4, seed=1)
    assert len(held) == 6 and not {doubled.sources[i] for i in kept} & {doubled.sources[i] for i in held}


def test_broken_lines_are_named(world):
    path = world / "pairs" / FILE
    good = path.read_text().splitlines()
    record = json.loads(good[0])
    for change, text in (
        ({"win": None}, "line 3: missing 'win'"), ({"win_box": [1, 2, 3]}, "line 3: 'win_box'"),
        ({"win_box": [5, 2, 3, 4]}, "line 3: 'win_box'"), ({"strength": 2}, "line 3: 'strength'"),
        ({"lose": "../../x.png"}, "line 3: .* outside"), ({"lose": "images/none.png"}, "line 3: .* does not exist"),
        ({"id": "000"}, "line 3: id '000' is there already"), ({"colour": 1}, "line 3: unknown field 'colour'"),
    ):  # fmt: skip
        path.write_text("\n".join([*good[:2], json.dumps({**record, "id": "new", **change})]))
        with pytest.raises(PairFormatError, match=text):
            PairDataset.read(path)
    path.write_text("{")
    with pytest.raises(PairFormatError, match="line 1: not JSON"):
        PairDataset.read(path)
    path.write_text("")
    with pytest.raises(PairFormatError, match="holds no pairs"):
        PairDataset.read(path)
    with pytest.raises(PairFormatError, match="does not exist"):
        PairDataset.read(world / "none")


def test_datasets_and_webdataset(world, tmp_path):
    import webdataset

    pairs = PairDataset.read(world / "pairs")
    table = pairs.to_datasets()
    assert len(table) == 8 and np.array_equal(np.asarray(table[0]["win"]), np.asarray(pairs.images(0)[0]))
    pairs.to_webdataset(tmp_path / "shard.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False).decode("pil"))
    assert [s["json"]["id"] for s in samples] == pairs.ids


def test_importers(tmp_path):
    def jpeg(level):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (level,) * 3).save(buffer, "JPEG")
        return buffer.getvalue()

    rows = [
        {"jpg_0": jpeg(10), "jpg_1": jpeg(200), "label_0": label, "caption": f"c{label}"} for label in (0.0, 0.5, 1.0)
    ]
    pairs = import_pickapic(rows, tmp_path / "p")
    brighter = [np.asarray(w).mean() > np.asarray(b).mean() for w, b in (pairs.images(i) for i in range(2))]
    assert len(pairs) == 2 and brighter == [True, False]
    images = [Image.new("RGB", (8, 8), (v,) * 3) for v in (1, 2, 3)]
    assert len(import_imagereward([{"prompt": "x", "generations": images, "ranking": [1, 2, 2]}], tmp_path / "q")) == 2
    with pytest.raises(PairFormatError, match="row 0"):
        import_pickapic([{"jpg_0": b"x"}], tmp_path / "r")
    with pytest.raises(PairFormatError, match="3 generations and 1 ranks"):
        import_imagereward([{"generations": images, "ranking": [1]}], tmp_path / "s")
    (tmp_path / "ranks.jsonl").write_text(json.dumps({"images": ["p/images/000000.win.png"], "rank": [1]}))
    with pytest.raises(PairFormatError, match="line 1"):
        read_rankings(tmp_path / "ranks.jsonl")


def test_mask_and_paste_leave_the_outside_alone():
    rng = np.random.default_rng(0)
    image, out = (Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(2))
    mask = face_mask(image.size, (10, 5, 30, 30))
    mixed, inside = np.asarray(paste(image, out, mask)), np.asarray(mask)
    assert (mixed[inside == 0] == np.asarray(image)[inside == 0]).all()
    assert (mixed[inside == 255] == np.asarray(out)[inside == 255]).all() and inside[17, 20] == 255
    assert not inside[:, 33:].any() and not inside[:, :8].any()


def test_hull_mask_is_the_grown_hull_of_the_points():
    points = [(20, 20), (40, 20), (30, 28), (22, 40), (38, 40)]
    mask = np.asarray(hull_mask((60, 60), points, grow=3, feather=2))
    assert mask[30, 30] == mask[20, 20] == mask[17, 30] == 255 and 0 < mask[16, 30] < 255 and mask[15, 30] == 0
    hard = np.asarray(hull_mask((60, 60), points, grow=0, feather=0))
    assert set(np.unique(hard)) == {0, 255} and hard[20:41].any(1).all() and not hard[:20].any()
    for bad, text in (
        ([(1, 1), (2, 2)], "span no area"), ([(1, 1), (2, 2), (3, 3)], "span no area"), ([], "span no area"),
        ([(90, 90), (95, 90), (90, 95)], "outside the image"),
    ):  # fmt: skip
        with pytest.raises(InvalidBoxError, match=text):
            hull_mask((60, 60), bad, grow=1, feather=1)


def test_builder_repaints_the_hull_of_the_landmarks(tmp_path):
    items = plain_items()
    for item in items:
        x1, y1, x2, y2 = item["boxes"][0]
        item["landmarks"] = [((x1 + 2, y1 + 2), (x2 - 2, y1 + 2), ((x1 + x2) / 2, y2 - 2))]
    pairs = builder(mask="landmarks").build(items, tmp_path / "hull")
    whole = builder().build(items, tmp_path / "box")
    for i in range(len(pairs)):
        (win, lose), mask = (pairs.images(i), np.asarray(pairs.mask(i)))
        assert 0 < (mask > 0).sum() < (np.asarray(whole.mask(i)) > 0).sum()
        assert (np.asarray(win)[mask == 0] == np.asarray(lose)[mask == 0]).all()
        assert pairs[i].win_box == whole[i].win_box
    with pytest.raises(UserError, match=r"'f0' has no landmarks.*mtcnn or yunet"):
        builder(mask="landmarks").build(plain_items(), tmp_path / "none")
    with pytest.raises(UserError, match=r"no pair could be made .*without a face: 4"):
        builder(min_face=99).build(plain_items(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="mask is 'hull', expected box or landmarks"):
        builder(mask="hull")


def test_landmarks_of_a_listing(world):
    listing = world / "images" / "metadata.jsonl"
    line = json.loads(listing.read_text().splitlines()[0])
    listing.write_text(json.dumps({**line, "landmarks": [[[1, 2], [3, 2], [2, 4]]]}))
    assert read_images(world / "images")[0]["landmarks"] == [((1, 2), (3, 2), (2, 4))]
    for bad, text in (
        ([[[1, 2]], [[1, 2]]], "2 landmarks, 1 boxes"),
        ([[1, 2]], "'landmarks' is"),
        (7, "'landmarks' is"),
    ):
        listing.write_text(json.dumps({**line, "landmarks": bad}))
        with pytest.raises(PairFormatError, match=f"line 1 .*{text}"):
            read_images(world / "images")


def test_builder_on_the_drawn_world(tmp_path):
    made = builder(strength=[0.5, 1.0], batch_size=3)
    pairs = made.build(plain_items(), tmp_path / "a")
    assert len(pairs) == made.counts["pairs"] == 8 and {r.strength for r in pairs.records} == {0.5, 1.0}
    for i in range(len(pairs)):
        (win, lose), mask = pairs.images(i), np.asarray(pairs.mask(i))
        assert (np.asarray(win)[mask == 0] == np.asarray(lose)[mask == 0]).all()
        assert (np.asarray(win) != np.asarray(lose)).any()


def test_winner_may_take_on_the_generators_grain(tmp_path):
    items = plain_items()
    touched = list(builder(grain=0.4, strength=[0.5, 1.0]).pairs(items))
    plain = list(builder(strength=[0.5, 1.0]).pairs(items))
    for a, b, i in zip(touched, plain, range(8), strict=True):
        win, original, mask = (np.asarray(x) for x in (a.win, items[i // 2]["image"], a.mask))
        assert (win != original).any() and (win[mask == 0] == original[mask == 0]).all()
        assert np.array_equal(np.asarray(a.lose), np.asarray(b.lose)) and a.record == b.record
        assert np.array_equal(np.asarray(b.win), original)
    for grain in (0.5, -0.1):
        with pytest.raises(UserError, match=f"grain is {grain}, expected 0 or more and below .* 0.5"):
            builder(grain=grain, strength=[0.5, 1.0])


def test_an_interrupted_build_goes_on_where_it_was(tmp_path):
    whole = builder().build(plain_items(), tmp_path / "whole")
    part = tmp_path / "part"

    def breaks():
        yield from plain_items()[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builder().build(breaks(), part)
    with open(part / FILE, "a") as stream:
        stream.write('{"id": "torn", "wi')
    resumed = builder().build(plain_items(), part)
    assert resumed.records == whole.records
    for record in whole.records:
        assert (part / record.lose).read_bytes() == (tmp_path / "whole" / record.lose).read_bytes()
    with pytest.raises(UserError, match="holds pairs already"):
        builder().build(plain_items(), part, resume=False)


def test_copied_faces_are_left_out_and_lost_faces_flagged():
    class Copy:
        def __call__(self, *, image, **kwargs):
            self.images = image
            return self

    class Once:
        calibrated = True

        def detect(self, image):
            return []

    made = InpaintPairBuilder(Copy(), "full-image", min_face=8, missing="ignore")
    assert list(made.pairs(plain_items())) == [] and made.counts["same"] == 4
    torch.manual_seed(0)
    pipe = new_pipeline((16, 24))
    for missing, expected in (("flag", 4), ("drop", 0)):
        made = InpaintPairBuilder(pipe, Once(), min_face=8, missing=missing, options={"num_inference_steps": 2})
        found = list(made.pairs(plain_items()))
        assert len(found) == expected and all(p.record.no_face for p in found)
    assert list(InpaintPairBuilder(Copy(), Once(), min_face=99).pairs(plain_items())) == []


def test_folder_of_images(world, tmp_path):
    items = read_images(world / "images")
    assert len(items) == 8 and items[0]["prompt"] == "a face" and len(items[0]["boxes"][0]) == 4
    (world / "images" / "metadata.jsonl").write_text('{"file_name": "../../x.png"}')
    with pytest.raises(PairFormatError, match="outside"):
        read_images(world / "images")
    (world / "images" / "metadata.jsonl").unlink()
    assert len(read_images(world / "images")) == 8
    (tmp_path / "void").mkdir()
    for folder, text in ((tmp_path / "void", "no images"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=text):
            read_images(folder)
    for option, value in (("strength", 0.0), ("missing", "?")):
        with pytest.raises(UserError, match=option):
            builder(**{option: value})
