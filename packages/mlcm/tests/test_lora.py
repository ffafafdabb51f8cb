import json
import logging

import pytest
import torch
from mlcm import MLCMScheduler, export_lora, load_lora, load_official_lora
from mlcm.lora import LORA_FILE
from mlcm.network import SDXL_TARGETS, add_lora
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_pipeline


def stir(network: torch.nn.Module) -> None:
    """Random LoRA factors: freshly made ones do nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def inputs(pipe) -> tuple:
    generator = torch.Generator().manual_seed(1)
    more = {}
    if hasattr(pipe, "text_encoder_2"):
        more = {
            "added_cond_kwargs": {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.ones(2, 6)}
        }
    width = pipe.unet.config.cross_attention_dim
    z, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, width, generator=generator)
    return (z, torch.tensor([3, 900]), text), more


@torch.no_grad()
def answer(pipe, unet) -> torch.Tensor:
    given, more = inputs(pipe)
    return unet(*given, **more).sample


@pytest.fixture
def official(pipe, tmp_path):
    """A folder in the layout that the authors published, and the outputs of the peft model it came from (alpha 8, rank 16)."""
    config = LoraConfig(r=16, lora_alpha=8, target_modules=list(SDXL_TARGETS))
    model = get_peft_model(load_pipeline(pipe.name_or_path).unet, config)
    stir(model)
    model.save_pretrained(tmp_path / "TLCM")
    return tmp_path / "TLCM", answer(pipe, model)


def test_official_folder_becomes_a_diffusers_lora_with_equal_outputs(pipe, official, tmp_path, caplog):
    folder, wanted = official
    with caplog.at_level(logging.INFO):
        lora = load_official_lora(folder, unet=pipe.unet)
    assert "lora_alpha 8 (adapter_config.json), rank 16: scale 0.5 baked in" in caplog.text
    file = export_lora(lora, tmp_path / "out")
    assert file.name == LORA_FILE
    pipe.load_lora_weights(str(tmp_path / "out"))
    torch.testing.assert_close(answer(pipe, pipe.unet), wanted, rtol=0, atol=1e-5)


def test_an_unstated_alpha_is_that_of_the_authors_code(pipe, official, caplog):
    folder, _ = official
    stated = load_official_lora(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    del settings["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.INFO):
        unstated = load_official_lora(folder)
    assert "lora_alpha 8 (peft's default, as in the authors' code)" in caplog.text
    assert all(torch.equal(stated.tensors[k], v) for k, v in unstated.tensors.items())
    given = load_official_lora(folder, alpha=16)
    assert given.origin == "given" and given.alpha == 16
    key = next(k for k in given.tensors if "lora_B" in k)
    torch.testing.assert_close(given.tensors[key], 2 * unstated.tensors[key])


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_exported_lora_loads_in_the_pipeline_and_gives_the_same_images(pipe, tmp_path, format):
    other = load_pipeline(pipe.name_or_path)
    add_lora(pipe.unet, 4, alpha=2)
    stir(pipe.unet)
    file = export_lora(pipe.unet, tmp_path, format=format)
    other.load_lora_weights(str(tmp_path), weight_name=file.name)
    latents = []
    for p in (pipe, other):
        p.set_progress_bar_config(disable=True)
        p.scheduler = MLCMScheduler.from_config(p.scheduler.config)
        generator = torch.Generator().manual_seed(0)
        latents.append(
            p("a cat", num_inference_steps=2, guidance_scale=0, generator=generator, output_type="latent").images
        )
    torch.testing.assert_close(*latents, rtol=0, atol=1e-3)
    torch.testing.assert_close(answer(pipe, pipe.unet), answer(other, other.unet), rtol=0, atol=1e-5)
    again = load_lora(file)
    assert again.rank == 4
    other.unload_lora_weights()
    again.check(other.unet)


def test_merged_and_unmerged_agree(pipe):
    add_lora(pipe.unet, 4, alpha=8)
    stir(pipe.unet)
    apart = answer(pipe, pipe.unet)
    pipe.fuse_lora(components=["unet"])
    torch.testing.assert_close(answer(pipe, pipe.unet), apart, rtol=0, atol=1e-5)


def test_a_peft_folder_comes_back(pipe, tmp_path):
    add_lora(pipe.unet, 4, alpha=2)
    stir(pipe.unet)
    export_lora(pipe.unet, tmp_path / "peft", format="peft")
    again = load_lora(tmp_path / "peft")
    export_lora(again, tmp_path / "file.safetensors")
    other = load_lora(tmp_path / "file.safetensors")
    assert again.tensors.keys() == other.tensors.keys()
    assert all(torch.allclose(again.tensors[k], v) for k, v in other.tensors.items())


def test_what_does_not_fit_is_named(pipe, official, tmp_path):
    folder, _ = official
    lora = load_official_lora(folder)
    name = next(k for k in lora.tensors if "lora_A" in k)
    lora.tensors[name] = lora.tensors[name][:, :3]
    layer = name.removesuffix(".lora_A.weight")
    lora.tensors["nowhere.lora_A.weight"] = lora.tensors["nowhere.lora_B.weight"] = torch.zeros(2, 2)
    with pytest.raises(UserError) as error:
        lora.check(pipe.unet)
    assert layer in str(error.value) and "nowhere is not there" in str(error.value)


def test_damaged_folders(tmp_path, official):
    folder, _ = official
    with pytest.raises(UserError, match="does not exist"):
        load_official_lora(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        load_official_lora(tmp_path / "empty")
    with pytest.raises(UserError, match="neither a folder here nor reachable"):
        load_official_lora("OPPOer/TLCM")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: torch.full_like(v, float("nan")) for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        load_official_lora(folder)
    first = next(iter(tensors))
    save_file({first: tensors[first]}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no whole LoRA; unusable keys"):
        load_official_lora(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="damaged adapter"):
        load_official_lora(folder)


def test_other_refusals(pipe, tmp_path):
    with pytest.raises(UserError, match="has no LoRA"):
        export_lora(pipe.unet, tmp_path)
    with pytest.raises(UserError, match="format is 'onnx'"):
        export_lora(pipe.unet, tmp_path, format="onnx")
    with pytest.raises(UserError, match="does not exist"):
        load_lora(tmp_path / "nothing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345")
    with pytest.raises(UserError, match="not a LoRA that diffusers reads"):
        load_lora(tmp_path / "bad.safetensors")
