"""The LoRA in and out: the authors' peft folder, diffusers' and kohya's files.

A file of diffusers is read with the scale 1 (alpha = rank), so every scale is multiplied into the weights here and a LoRA is
never too strong or too weak, whatever reads it.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor, nn

log = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers' load_lora_weights looks for."""
FORMATS = ("diffusers", "kohya", "peft")
CODE_ALPHA = 8.0
"""peft's default, which the authors' inference code uses: their folder is loaded into an adapter that already exists."""


@dataclass(frozen=True)
class Lora:
    """LoRA factors of a UNet with every scale baked in.

    tensors: "<layer>.lora_A.weight" and "<layer>.lora_B.weight". alpha: what was baked, and `origin`, where it was found.
    """

    tensors: dict[str, Tensor]
    alpha: float
    origin: str

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(t.shape[0] for name, t in self.tensors.items() if ".lora_A." in name)

    def check(self, unet: nn.Module) -> None:
        """Raise UserError naming layers that a UNet does not have, or that are of another size."""
        layers, wrong = dict(unet.named_modules()), []
        for name, tensor in self.tensors.items():
            layer, factor = name.rsplit(".lora_", 1)
            weight = getattr(layers.get(layer), "weight", None)
            if weight is None:
                wrong.append(f"{layer} is not there")
            elif tensor.shape[1 if factor.startswith("A") else 0] != weight.shape[1 if factor.startswith("A") else 0]:
                wrong.append(f"{name} is {tuple(tensor.shape)} for a weight {tuple(weight.shape)}")
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise UserError(
                f"the LoRA does not fit this UNet: {'; '.join(wrong[:4])}{more}", hint="another base model?"
            )


def load_official_lora(path: str | Path, *, unet: nn.Module | None = None, alpha: float | None = None) -> Lora:
    """The authors' peft adapter folder (adapter_config.json, adapter_model.safetensors), scale baked in.

    path: folder or hub id (OPPOer/TLCM). unet: when given, the layers are checked against it. alpha: in place of the folder's;
    without either 8, peft's default in the authors' code. The log says which one was used.
    Raises UserError when files are missing or damaged, or layers do not fit `unet`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = _folder(path)
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    pickled = folder / "adapter_model.bin"
    try:
        raw = load_file(file) if file.exists() else torch.load(pickled, map_location="cpu", weights_only=True)
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no adapter_model.safetensors", hint="pass a peft adapter folder") from error
    except (ValueError, SafetensorError, RuntimeError, OSError) as error:
        raise UserError(f"{folder} holds a damaged adapter ({type(error).__name__}: {error})") from error
    if config.get("alpha_pattern") or config.get("use_dora"):
        raise UserError(f"{config_file} uses alpha_pattern or DoRA, which a plain LoRA file cannot hold")
    if alpha is not None:
        origin = "given"
    elif config.get("lora_alpha") is not None:
        alpha, origin = float(config["lora_alpha"]), "adapter_config.json"
    else:
        alpha, origin = CODE_ALPHA, "peft's default, as in the authors' code"
    tensors = {}
    for name, tensor in raw.items():
        plain = name.removeprefix("base_model.model.").removeprefix("unet.").replace(".default.", ".")
        if ".lora_B." in plain:
            rank = tensor.shape[1]
            tensor = tensor * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        tensors[plain] = tensor
    lora = Lora(_paired(tensors, folder), alpha, origin)
    log.info("lora_alpha %g (%s), rank %d: scale %g baked in", alpha, origin, lora.rank, alpha / lora.rank)
    if unet is not None:
        lora.check(unet)
    return lora


def load_lora(path: str | Path) -> Lora:
    """A LoRA file or folder of diffusers or kohya, or a peft folder.

    Raises UserError when it is none of them.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    path = Path(path)
    if (path / "adapter_config.json").exists() or (path / "adapter_model.safetensors").exists():
        return load_official_lora(path)
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist", hint="pass a LoRA file, or a folder with adapter_model.safetensors")
    try:
        tensors, alphas = StableDiffusionPipeline.lora_state_dict(str(file.parent), weight_name=file.name)
    except Exception as error:
        raise UserError(f"{file} is not a LoRA that diffusers reads ({type(error).__name__})") from error
    unet = {k.removeprefix("unet."): v for k, v in tensors.items() if k.startswith("unet.")}
    scales = {k.removeprefix("unet.").removesuffix(".alpha"): float(v) for k, v in (alphas or {}).items()}
    found = {}
    for name, tensor in convert_unet_state_dict_to_peft(unet).items():
        layer = name.rsplit(".lora_", 1)[0]
        baked = layer in scales and ".lora_B." in name
        found[name] = tensor * (scales[layer] / tensor.shape[1]) if baked else tensor
    lora = Lora(_paired(found, file), math.nan, "the file")
    return Lora(lora.tensors, float(lora.rank), lora.origin)


def lora_of(network: nn.Module, *, name: str = "default") -> Lora:
    """The LoRA inside a network, its scale baked in. Raises UserError when there is none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tensors, alpha = {}, 0.0
    for layer, module in network.named_modules():
        if not isinstance(module, BaseTunerLayer) or name not in getattr(module, "lora_A", {}):
            continue
        layers: Any = module
        alpha = float(layers.lora_alpha[name])
        tensors[f"{layer}.lora_A.weight"] = layers.lora_A[name].weight.detach().cpu().float()
        tensors[f"{layer}.lora_B.weight"] = layers.lora_B[name].weight.detach().cpu().float() * layers.scaling[name]
    if not tensors:
        raise UserError(f"{type(network).__name__} has no LoRA '{name}'", hint="train one first")
    return Lora(tensors, alpha, "the network")


def export_lora(source: nn.Module | Lora, path: str | Path, *, format: str = "diffusers") -> Path:
    """Write a LoRA that other programs load.

    source: a trained network, or a loaded LoRA. path: a .safetensors file, or a folder for its usual name. format: "diffusers"
    (`pipe.load_lora_weights(path)`), "kohya" (ComfyUI, AUTOMATIC1111) or "peft" (a folder with alpha = rank). Returns the file.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    if format not in FORMATS:
        raise UserError(f"format is '{format}', expected one of {', '.join(FORMATS)}")
    lora, path = source if isinstance(source, Lora) else lora_of(source), Path(path)
    if format == "peft":
        return _export_peft(lora, path)
    tensors = {f"unet.{name}": tensor for name, tensor in lora.tensors.items()}
    if format == "kohya":
        tensors = convert_state_dict_to_kohya(tensors)
    file = (
        path
        if path.suffix == ".safetensors"
        else path / (LORA_FILE if format == "diffusers" else "mlcm_kohya.safetensors")
    )
    with replace_atomically(file) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt"})
    return file


def _export_peft(lora: Lora, path: Path) -> Path:
    from peft import LoraConfig
    from safetensors.torch import save_file

    layers = sorted({name.rsplit(".lora_", 1)[0] for name in lora.tensors})
    config = LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=layers)
    with replace_atomically(path) as partial:
        partial.mkdir()
        config.save_pretrained(str(partial))
        save_file(
            {f"base_model.model.{k}": v.contiguous() for k, v in lora.tensors.items()},
            partial / "adapter_model.safetensors",
        )
    return path / "adapter_model.safetensors"


def _paired(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors when each A has its B and both are finite."""
    foreign = [k for k in tensors if not k.endswith((".lora_A.weight", ".lora_B.weight"))]
    single = [
        k
        for k in tensors
        if k.replace(".lora_A.", ".lora_B.") not in tensors or k.replace(".lora_B.", ".lora_A.") not in tensors
    ]
    if foreign or single or not tensors:
        named = ", ".join((foreign + single)[:4]) or "none"
        raise UserError(f"{source} holds no whole LoRA; unusable keys: {named}")
    if broken := [k for k, v in tensors.items() if not v.isfinite().all()]:
        raise UserError(f"{source} holds numbers that are not finite in {', '.join(broken[:4])}")
    return tensors


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(f"folder '{name}' does not exist", hint="pass a peft adapter folder, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["adapter_*"]))
    except Exception as error:
        raise UserError(
            f"'{name}' is neither a folder here nor reachable on the hub", hint="check the id and the network"
        ) from error
