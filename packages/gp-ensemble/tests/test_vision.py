import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from gp_ensemble import CacheError, GPEnsembleClassifier
from gp_ensemble.errors import FeatureError, UserError
from gp_ensemble.vision import (
    CallableExtractor,
    OpenClipExtractor,
    TimmExtractor,
    TorchvisionExtractor,
    TransformersExtractor,
    extract_features,
    extraction,
    make_extractor,
    open_images,
    open_split,
)
from PIL import Image as Pillow

COLOURS = {"red_ball": (200, 30, 30), "green_box": (30, 190, 40), "blue_sky": (40, 60, 210)}


def colour_folder(root: Path, count: int = 4, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.asarray(colour) + rng.normal(0, 25, (20, 24, 3)), 0, 255).astype(np.uint8)
            Pillow.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def mean_colour(images: list) -> np.ndarray:
    return np.stack([np.asarray(i, dtype=np.float32).reshape(-1, 3).mean(0) for i in images])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colour_folder(tmp_path / "images")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of random weights, in transformers' own format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        PreTrainedTokenizerFast,
    )  # fmt: skip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    words = [
        "<pad>",
        "<unk>",
        *[
            "a",
            "photo",
            "of",
            "the",
            "red",
            "ball",
            "green",
            "box",
            "blue",
            "sky",
            "drawing",
            "close-up",
            "blurry",
            ".",
            "close",
            "up",
            "-",
        ],
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<unk>", model_max_length=16
    )
    text = CLIPTextConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2,
                          max_position_embeddings=16, projection_dim=8, bos_token_id=1, eos_token_id=1,
                          pad_token_id=0)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                              image_size=16, patch_size=8, projection_dim=8)  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(path)
    fast.save_pretrained(path)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def open_clip_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny open_clip model: its registered name and a checkpoint."""
    import open_clip

    path = tmp_path_factory.mktemp("open_clip") / "tiny-test-clip.json"
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test-clip", pretrained=None)
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    return "tiny-test-clip", path.with_suffix(".pt")


def test_a_folder_is_read_by_class(folder: Path) -> None:
    images = open_images(folder)
    assert len(images) == 12 and images.classes() == sorted(COLOURS) and images.names[0] == "blue_sky/0.png"
    assert images.read(0).mode == "RGB" and images.labels.tolist()[:4] == ["blue_sky"] * 4
    before = images.fingerprint
    (folder / "blue_sky" / "0.png").touch()
    assert open_images(folder).fingerprint != before


def test_arrays_and_datasets() -> None:
    array = np.random.default_rng(0).integers(0, 255, (6, 9, 9, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(open_images(array).read(3)), array[3])
    assert open_images(array[..., 0] / 255.0).read(0).size == (9, 9)
    rows = {"image": [Pillow.fromarray(a) for a in array], "label": [0, 1, 0, 1, 0, 1]}
    dataset = Dataset.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])}))
    images = open_images(dataset)
    assert images.labels.tolist() == ["cat", "dog"] * 3 and np.array_equal(np.asarray(images.read(2)), array[2])
    with pytest.raises(UserError, match="no column 'picture'"):
        open_images(dataset, image_column="picture")
    for bad in (array.reshape(-1), array / 100.0, object()):
        with pytest.raises(UserError, match="images"):
            open_images(bad)


def test_coop_splits_stay_in_their_folder(folder: Path, tmp_path: Path) -> None:
    split = tmp_path / "split_zhou_Colours.json"
    split.write_text(json.dumps({"train": [["red_ball/1.png", 0, "ball"], ["blue_sky/0.png", 1, "sky"]]}))
    images = open_split(split, "train", root=folder)
    assert images.names == ["red_ball/1.png", "blue_sky/0.png"] and images.labels.tolist() == ["ball", "sky"]
    with pytest.raises(UserError, match="no part 'val'"):
        open_split(split, "val", root=folder)
    split.write_text(json.dumps({"train": [["../../etc/passwd", 0, "x"]]}))
    with pytest.raises(UserError, match="outside"):
        open_split(split, "train", root=folder)
    split.write_text("not json")
    with pytest.raises(UserError, match="no part"):
        open_split(split, "train", root=folder)


def test_timm_extracts_what_timm_gives(folder: Path) -> None:
    import timm

    torch.manual_seed(0)
    extractor = TimmExtractor("cnn", "test_resnet", pretrained=False)
    table = extract_features(folder, [extractor])
    images = open_images(folder)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(extractor.model))
    with torch.inference_mode():
        expected = extractor.model(torch.stack([transform(images.read(i)) for i in range(12)])).numpy()
    np.testing.assert_allclose(table["cnn"], expected, atol=1e-5)


def test_open_clip_to_a_classifier_by_name(folder: Path, open_clip_model: tuple[str, Path]) -> None:
    name, checkpoint = open_clip_model
    extractor = OpenClipExtractor("clip", name, pretrained=str(checkpoint))
    zero_shot = extractor.zero_shot(sorted(COLOURS))
    assert zero_shot.weights.shape == (8, 3)
    np.testing.assert_allclose(np.linalg.norm(zero_shot.weights, axis=0), 1, atol=1e-5)
    table = extract_features(folder, [extractor])
    clf = GPEnsembleClassifier(zero_shot=zero_shot).fit(table, table.labels)
    assert clf.score(table, table.labels) > 0.6


def test_transformers_clip_and_vit(folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

    extractor = TransformersExtractor("clip", str(clip_folder))
    table = extract_features(folder, [extractor])
    model = CLIPModel.from_pretrained(clip_folder)
    pixels = extractor.processor(images=[open_images(folder).read(0)], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = model.get_image_features(pixel_values=pixels)
    expected = getattr(expected, "pooler_output", expected)
    np.testing.assert_allclose(table["clip"][0], expected[0], atol=1e-5)
    zero_shot = extractor.zero_shot(["red ball", "blue sky"])
    assert zero_shot.weights.shape == (8, 2) and zero_shot.scale == pytest.approx(
        float(model.logit_scale.detach().exp())
    )
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16,
                       patch_size=8)  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    pools = {p: TransformersExtractor("vit", str(tmp_path / "vit"), pool=p) for p in ("cls", "mean", "pooler")}
    found = [extract_features(folder, [e])["vit"] for e in pools.values()]
    assert all(f.shape == (12, 16) for f in found) and not np.allclose(found[0], found[1])
    with pytest.raises(UserError, match="no text tower"):
        pools["cls"].zero_shot(["a"])


def test_torchvision_without_its_head(folder: Path) -> None:
    table = extract_features(folder, [TorchvisionExtractor("squeeze", "resnet18", pretrained=False)])
    assert table["squeeze"].shape == (12, 512)


@pytest.mark.parametrize("prefix", ["module.encoder_q.", "module.base_encoder.", "backbone.", ""])
def test_checkpoints_in_the_layout_of_moco_and_dino(prefix: str, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(1)
    trained = timm.create_model("test_resnet", num_classes=5).eval()
    state = {f"{prefix}{k}": v for k, v in trained.state_dict().items()}
    if "encoder" in prefix:
        momentum = prefix.replace("encoder_q", "encoder_k").replace("base", "momentum")
        state |= {f"{momentum}{k}": v + 1 for k, v in trained.state_dict().items()} | {"module.queue": torch.zeros(3)}
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": state, "epoch": 3}, path)
    loaded = make_extractor(f"moco=timm:test_resnet@{path}")
    own = loaded.model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in trained.state_dict().items() if k in own) and len(own) > 10
    with pytest.raises(UserError, match="does not fit"):
        make_extractor(f"moco=timm:test_vit@{path}")


def test_the_cache_is_used_and_follows_the_model(folder: Path, tmp_path: Path) -> None:
    calls = []

    def counted(images: list) -> np.ndarray:
        calls.append(len(images))
        return mean_colour(images)

    def run(version: str, **kwargs: int) -> np.ndarray:
        return extract_features(
            folder, [CallableExtractor("rgb", counted, version=version)], cache_dir=tmp_path, **kwargs
        )["rgb"]

    first = run("1")
    assert sum(calls) == 12 and np.array_equal(run("1"), first) and sum(calls) == 12
    run("2")
    assert sum(calls) == 24
    many = run("1", views=3, seed=1)
    assert sum(calls) == 24 + 36 and np.array_equal(many, run("1", views=3, seed=1)) and not np.array_equal(many, first)


def test_an_interrupted_extraction_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "SHARD", 4)
    calls = []

    def fragile(images: list) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return mean_colour(images)

    extractor = CallableExtractor("rgb", fragile, version="1")
    with pytest.raises(KeyboardInterrupt):
        extract_features(folder, [extractor], cache_dir=tmp_path)
    whole = extract_features(folder, [extractor], cache_dir=tmp_path)["rgb"]
    assert len(calls) == 4
    expected = extract_features(folder, [CallableExtractor("rgb", mean_colour, version="1")])["rgb"]
    assert np.array_equal(whole, expected)
    assert [p.suffix for p in tmp_path.iterdir() if p.name.startswith("rgb")] == [".safetensors"]


def test_a_damaged_cache_is_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    extractor = CallableExtractor("rgb", mean_colour, version="1")
    extract_features(folder, [extractor], cache_dir=tmp_path)
    (path,) = tmp_path.glob("rgb-*.safetensors")
    for damage in (lambda: path.write_bytes(b"junk"), lambda: save_file({"features": np.zeros((12, 3))}, path)):
        damage()
        with pytest.raises(CacheError, match=path.name):
            extract_features(folder, [extractor], cache_dir=tmp_path)


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        open_images(tmp_path / "empty")
    rgb = CallableExtractor("rgb", mean_colour, version="1")
    with pytest.raises(UserError, match="each name once"):
        extract_features(folder, [rgb, rgb])
    with pytest.raises(UserError, match="views is 0"):
        extract_features(folder, [rgb], views=0)
    with pytest.raises(FeatureError, match="not finite"):
        extract_features(folder, [CallableExtractor("nan", lambda i: np.full((len(i), 2), np.nan), version="1")])
    whole = (folder / "red_ball" / "0.png").read_bytes()
    for content in (b"no image", whole[: len(whole) // 2], b""):
        (folder / "red_ball" / "2.png").write_bytes(content)
        with pytest.raises(UserError, match=r"red_ball/2\.png' cannot be read"):
            extract_features(folder, [rgb], cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "junk.pth").write_bytes(b"junk")
    for text, message in {
        "clip": "expected NAME=LIBRARY:MODEL",
        "a=keras:resnet": "expected timm",
        "a=timm:no_such_model": "timm has no model",
        "a=open_clip:no-such/tag": "open_clip has no model",
        "a=open_clip:RN50": "has no weights",
        "a=open_clip:RN50@/nowhere.pt": "does not exist",
        "a=torchvision:no_such": "torchvision has no model",
        "a=timm:test_resnet@/nowhere.pth": "does not exist",
        f"a=timm:test_resnet@{tmp_path / 'junk.pth'}": "cannot be read",
        "a=transformers:/nowhere/model": "does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            make_extractor(text)


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for text in (
        "a=timm:test_resnet.r160_in1k",
        "a=transformers:nobody/nothing-at-all",
        "a=open_clip:hf-hub:nobody/nothing",
    ):
        with pytest.raises(UserError, match=r"could (not )?be loaded"):
            make_extractor(text)
