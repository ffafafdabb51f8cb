"""Latents on disk, captions and conditions."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from scott import LatentDataset, SCottConfig, prepare_latents
from scott.conditioners import TextConditioner, conditioner_for, join
from scott.data import encode, read_images
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_pipeline


def test_latents_are_the_vaes_and_survive_the_disk(sd, images, tmp_path):
    dataset = prepare_latents(read_images(images), sd.vae, tmp_path / "latents", size=16, batch_size=4, shard=4)
    assert len(dataset) == 6 and sorted(p.name for p in (tmp_path / "latents").iterdir())[1:] == [
        "latents-00000.safetensors", "latents-00001.safetensors",
    ]  # fmt: skip
    again = LatentDataset(tmp_path / "latents")
    assert again.captions == [f"image {i}" for i in range(6)]
    with Image.open(images / "5.png") as image:
        import numpy as np
        from PIL import ImageOps

        pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (16, 16), Image.Resampling.LANCZOS), dtype=np.float32)
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = sd.vae.encode(pixels).latent_dist.mode() * sd.vae.config.scaling_factor
    assert torch.allclose(again[5][0], expected[0], atol=1e-3) and again[5][1] == "image 5"
    assert torch.allclose(encode(sd.vae, pixels), expected, atol=1e-6)


def test_webdataset_tar(tmp_path, images):
    pytest.importorskip("datasets")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(3):
            for name, content in ((f"{i}.png", (images / f"{i}.png").read_bytes()), (f"{i}.txt", b"a caption")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    pairs = list(read_images(tmp_path / "shard.tar"))
    assert len(pairs) == 3 and pairs[0][1] == "a caption" and pairs[0][0].size == (24, 20)


def test_captions_beside_the_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a black square\n")
    assert [caption for _, caption in read_images(tmp_path)] == ["a black square"]


@pytest.mark.parametrize("kind", ["sd_folder", "sdxl_folder"])
def test_text_conditions_run_the_unet(kind, request):
    pipe = load_pipeline(request.getfixturevalue(kind))
    conditioner = conditioner_for(pipe)
    assert isinstance(conditioner, TextConditioner) and conditioner.is_xl == (kind == "sdxl_folder")
    condition, empty = conditioner(["a", "b"]), conditioner.empty(2)
    both = join(condition, empty)
    with torch.no_grad():
        out = pipe.unet(torch.randn(4, 4, 8, 8), torch.tensor([5, 5, 900, 900]), **both).sample
    assert out.shape == (4, 4, 8, 8)
    if conditioner.is_xl:
        assert both["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 4
        assert float(empty["encoder_hidden_states"].abs().max()) == 0.0
    prompt = pipe.encode_prompt("b", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    assert torch.equal(condition["encoder_hidden_states"][1:], prompt)


def test_sdxl_trains(sdxl_folder, tmp_path):
    from scott import SCottTrainer

    pipe = load_pipeline(sdxl_folder)
    config = SCottConfig(rank=2, disc_rank=2, batch=2, iterations=1)
    SCottTrainer(pipe, config).fit(LatentDataset.of(torch.randn(2, 4, 8, 8), ["a", "b"]), output=tmp_path)
    fresh = load_pipeline(sdxl_folder)
    fresh.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    assert fresh.get_active_adapters()


def test_dataset_errors(tmp_path, sd, images):
    with pytest.raises(UserError, match="holds no latents"):
        LatentDataset(tmp_path)
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        LatentDataset(folder)
    for name in ("../escape.safetensors", "missing.safetensors"):
        (folder / "index.json").write_text(json.dumps({"shards": [{"file": name, "rows": 1}], "captions": ["a"]}))
        with pytest.raises(UserError, match="is not in"):
            LatentDataset(folder)
    (folder / "missing.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        LatentDataset(folder)
    (folder / "index.json").write_text(
        json.dumps({"shards": [{"file": "missing.safetensors", "rows": 1}], "captions": []})
    )
    with pytest.raises(UserError, match="0 captions for another number"):
        LatentDataset(folder)
    with pytest.raises(UserError, match="latents hold NaN"):
        LatentDataset.of(torch.full((1, 4, 8, 8), torch.nan))
    with pytest.raises(UserError, match="expected \\(rows, channels, height, width\\)"):
        LatentDataset.of(torch.zeros(4, 8, 8))
    with pytest.raises(UserError, match="1 captions for 2 latents"):
        LatentDataset.of(torch.zeros(2, 4, 8, 8), ["a"])
    with pytest.raises(UserError, match="holds no images"):
        list(read_images(folder))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="not a readable image"):
        prepare_latents(read_images(broken), sd.vae, tmp_path / "out", size=16)
    assert not (tmp_path / "out").exists()
    (broken / "metadata.jsonl").write_text("{broken")
    with pytest.raises(UserError, match="is damaged"):
        list(read_images(broken))
    with pytest.raises(UserError, match="neither a folder of images nor"):
        read_images(images / "0.png")


def test_config_errors(tmp_path):
    for settings, words in (
        ({"substeps": 30}, "30 sub-steps in a skip of 24"),
        ({"substeps": 0}, "substeps"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"guidance": (5, 15)}, "LoRA student, which has no ω input"),
        ({"guidance": (15, 5), "student": "full"}, "expected ω of 0 or more"),
        ({"noise_below": 0}, "noise_below is 0"),
        ({"solver": "euler"}, "solver"),
        ({"sub_steps": 3}, "sub_steps"),
    ):
        with pytest.raises(UserError, match=words):
            SCottConfig.of(settings)
    file = tmp_path / "c.yaml"
    file.write_text("skip: 24\nsubsteps: 2\nguidance: [2, 4]\nstudent: full\n")
    assert SCottConfig.load(file).guidance == (2.0, 4.0)
    for text, words in ((": : :", "neither YAML nor JSON"), ("", "holds no settings"), ("lr: x", "lr: .* given 'x'")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            SCottConfig.load(file)
