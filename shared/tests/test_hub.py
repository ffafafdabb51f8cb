import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import HfApi
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_model, load_pipeline, load_tokenizer, replace_atomically
from transformers import AutoModel, BertConfig, BertModel


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    sizes = {
        "vocab_size": 16,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_saved_model_loads_as_the_library_loads_it(model_folder: Path) -> None:
    ours, theirs = load_model(AutoModel, model_folder), AutoModel.from_pretrained(model_folder)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_saved_pipeline_loads(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    assert isinstance(load_pipeline(tmp_path / "ddpm"), DDPMPipeline)


@pytest.mark.parametrize("load", [lambda name: load_model(AutoModel, name), load_tokenizer, load_pipeline])
def test_what_is_neither_folder_nor_reachable_id_is_one_clear_error(load, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder here nor a model that could be loaded"):
        load("nobody/no-such-model")
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        load(tmp_path / "empty")


def test_without_a_network_an_unknown_model_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loader, whose client tries every file again and again, is not asked; a model in the cache is its business."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_, **__: HfApi(endpoint="http://127.0.0.1:9").whoami(token="x")
    )
    asked = []

    class Loader:
        @staticmethod
        def from_pretrained(name: str, **_: object) -> str:
            asked.append(name)
            return "loaded"

    with pytest.raises(UserError, match="'nobody/nothing' is no folder here and the hub cannot be reached"):
        load_model(Loader, "nobody/nothing")
    assert not asked
    (tmp_path / "models--nobody--nothing").mkdir()
    assert load_model(Loader, "nobody/nothing") == "loaded"


def test_truncated_weights_are_named(model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(UserError, match="bert"):
        load_model(AutoModel, model_folder)


def test_pickled_weights_are_refused(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    torch.save({}, model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(AutoModel, model_folder)


def test_file_and_folder_are_replaced_whole(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.txt", tmp_path / "checkpoint"
    for text in ("old", "new"):
        with replace_atomically(file) as partial:
            partial.write_text(text)
        with replace_atomically(folder) as partial:
            partial.mkdir()
            (partial / f"{text}.txt").write_text(text)
    assert file.read_text() == "new"
    assert [p.name for p in folder.iterdir()] == ["new.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "checkpoint"]


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fail() -> None:
        with replace_atomically(file) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    code = (
        "import os, sys, signal; from tenfold_shared.hub import replace_atomically\n"
        "with replace_atomically(sys.argv[1]) as p:\n    p.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, file]).returncode == -signal.SIGKILL
    assert file.read_text() == "old"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    with replace_atomically(tmp_path / "a.txt") as partial:
        partial.write_text("x")
    assert os.stat(tmp_path / "a.txt").st_mode & 0o044 == 0o044 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
