"""Checkpoints in the two layouts: the official one (`FS_model.pt`, `ImageReward.pt`) and ours (safetensors + config.json).

Loading is strict: every key is used, or is one of the few that the reward never touches (`UNUSED`), which are kept so that
a checkpoint exports back byte for byte. Sizes are read from the tensors; the numbers of heads cannot be, and come from
`config.json`, from `med_config.json` (text), or are taken as 64 wide (vision), as in every published checkpoint.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor

from facescore.errors import CheckpointError
from facescore.reward.model import RewardModel, RewardModelConfig

OFFICIAL_FILES = ("FS_model.pt", "ImageReward.pt")
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
PROJECTION = 256
"""Width of the unused projections in the published checkpoints."""

_TO_OURS = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)
_TO_OFFICIAL = (
    (r"^vision\.embeddings\.class_embedding$", "blip.visual_encoder.cls_token"),
    (r"^vision\.embeddings\.position_embedding$", "blip.visual_encoder.pos_embed"),
    (r"^vision\.embeddings\.patch_embedding\.", "blip.visual_encoder.patch_embed.proj."),
    (r"^vision\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blip.visual_encoder.blocks.\1.norm\2."),
    (r"^vision\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blip.visual_encoder.blocks.\1.attn.qkv."),
    (r"^vision\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blip.visual_encoder.blocks.\1.attn.proj."),
    (r"^vision\.encoder\.layers\.(\d+)\.mlp\.", r"blip.visual_encoder.blocks.\1.mlp."),
    (r"^vision\.post_layernorm\.", "blip.visual_encoder.norm."),
    (r"^text\.", "blip.text_encoder."),
    (r"^head\.", "mlp."),
)


def to_ours(key: str) -> str | None:
    """Our name of an official key, or None when the key is of neither the model nor the unused ones."""
    return _rename(key, _TO_OURS)


def to_official(key: str) -> str:
    """The official name of one of our keys."""
    name = _rename(key, _TO_OFFICIAL)
    if name is None:
        raise CheckpointError(f"'{key}' is not a key of the reward model")
    return name


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in rules:
        name, count = re.subn(pattern, replacement, key)
        if count:
            return name
    return None


def infer_config(state: dict[str, Tensor], **heads: Any) -> RewardModelConfig:
    """Sizes of the model that an official state dict belongs to.

    heads: fields that the tensors cannot show (`vision_heads`, `text_heads`, `prompt_ids`, `text_dropout`, `pad_to`).
    Raises CheckpointError naming the keys without which nothing can be known.
    """
    vit, bert = "blip.visual_encoder.", "blip.text_encoder."
    needed = [
        vit + "patch_embed.proj.weight",
        vit + "pos_embed",
        vit + "blocks.0.mlp.fc1.weight",
        bert + "embeddings.word_embeddings.weight",
        bert + "embeddings.position_embeddings.weight",
        bert + "encoder.layer.0.intermediate.dense.weight",
        *(f"mlp.layers.{i}.weight" for i in (0, 2, 4, 6, 7)),
    ]
    if missing := [key for key in needed if key not in state]:
        raise CheckpointError(f"not a reward checkpoint: {len(missing)} keys are missing: {_list(missing)}")
    patch, words = state[needed[0]], state[needed[3]]
    text_width = words.shape[1]
    sizes: dict[str, Any] = {
        "patch_size": patch.shape[-1],
        "image_size": round((state[needed[1]].shape[1] - 1) ** 0.5) * patch.shape[-1],
        "vision_width": patch.shape[0],
        "vision_depth": _depth(state, vit + "blocks."),
        "vision_heads": max(1, patch.shape[0] // 64),
        "vision_mlp": state[needed[2]].shape[0],
        "text_width": text_width,
        "text_depth": _depth(state, bert + "encoder.layer."),
        "text_heads": max(1, text_width // 64),
        "text_mlp": state[needed[5]].shape[0],
        "vocabulary": words.shape[0],
        "positions": state[needed[4]].shape[0],
        "head_widths": tuple(state[key].shape[0] for key in needed[6:]),
    }
    return RewardModelConfig(**{**sizes, **heads})


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))


def from_official(state: dict[str, Tensor], **heads: Any) -> RewardModel:
    """The model of an official state dict, strictly. Raises CheckpointError listing missing, unexpected and ill-shaped keys."""
    config = infer_config(state, **heads)
    with torch.device("meta"):
        model = RewardModel(config)
    ours, unused, unexpected = {}, {}, []
    for key, tensor in state.items():
        if UNUSED.fullmatch(key):
            unused[key] = tensor
        elif (name := to_ours(key)) is None:
            unexpected.append(key)
        else:
            ours[name] = tensor
    _fill(model, ours, to_official, unexpected)
    model.unused = unused
    return model.eval()


def _fill(model: RewardModel, ours: dict[str, Tensor], name: Any, unexpected: list[str]) -> None:
    """Put tensors into a model on the meta device; what does not fit is listed under the names of the file."""
    wanted = model.state_dict()
    missing = [name(key) for key in wanted if key not in ours]
    unexpected = unexpected + [name(key) for key in ours if key not in wanted]
    wrong = [
        f"{name(key)} {tuple(tensor.shape)} instead of {tuple(wanted[key].shape)}"
        for key, tensor in ours.items()
        if key in wanted and tensor.shape != wanted[key].shape
    ]
    if missing or unexpected or wrong:
        parts = [
            f"{len(keys)} {what}: {_list(keys)}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if keys
        ]
        raise CheckpointError(
            f"the checkpoint's keys do not fit: {'; '.join(parts)}", hint="pass a FaceScore or ImageReward checkpoint"
        )
    if bad := [name(key) for key, tensor in ours.items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(
            f"the checkpoint holds NaN or infinity in {len(bad)} tensors: {_list(bad)}", hint="take an earlier one"
        )
    model.load_state_dict(ours, strict=True, assign=True)
    # Buffers that no checkpoint holds are still on the meta device.
    embeddings = model.text.embeddings
    embeddings.position_ids = torch.arange(model.config.positions).expand(1, -1)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def official_state(model: RewardModel) -> dict[str, Tensor]:
    """The model as an official state dict; the unused tensors as they came, or zeros where there never were any."""
    c = model.config
    state = {to_official(key): tensor for key, tensor in model.state_dict().items()}
    unused = {
        "blip.vision_proj.weight": torch.zeros(PROJECTION, c.vision_width),
        "blip.vision_proj.bias": torch.zeros(PROJECTION),
        "blip.text_proj.weight": torch.zeros(PROJECTION, c.text_width),
        "blip.text_proj.bias": torch.zeros(PROJECTION),
        "blip.text_encoder.embeddings.position_ids": torch.arange(c.positions).expand(1, -1),
    }
    state |= model.unused or unused
    return {key: tensor.contiguous() for key, tensor in state.items()}


def load_reward(name: str | Path) -> RewardModel:
    """A reward model from a hub id, a folder, an official `.pt` file or our `.safetensors` file, in evaluation mode.

    Pickles are read with `weights_only=True`. Raises CheckpointError when the file is damaged or not a reward model, and
    UserError when there is no such file and no hub to ask.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        for candidate in ("model.safetensors", *OFFICIAL_FILES):
            if (path / candidate).is_file():
                return _load_file(path / candidate)
        raise CheckpointError(
            f"folder '{path}' holds neither model.safetensors nor {' nor '.join(OFFICIAL_FILES)}",
            hint="pass a folder made by facescore train or convert, or the file itself",
        )
    if path.is_absolute() or path.suffix or str(name).count("/") != 1:
        raise UserError(f"reward checkpoint '{name}' does not exist", hint="pass a file, a folder or a hub id")
    return _load_file(_download(str(name)))


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    last: Exception | None = None
    for weights, config in (
        ("model.safetensors", "config.json"),
        ("FS_model.pt", "med_config.json"),
        ("FaceScore_model/FS_model.pt", "FaceScore_model/med_config.json"),
        ("ImageReward.pt", "med_config.json"),
    ):
        try:
            path = hf_hub_download(name, weights)
            hf_hub_download(name, config)
            return Path(path)
        except (OSError, ValueError) as error:
            last = error
    hint = "check the id and the network, or pass a file that is here"
    raise UserError(f"'{name}' is neither a file here nor a reward model on the hub", hint=hint) from last


def _load_file(path: Path) -> RewardModel:
    if path.suffix == ".safetensors":
        return _load_ours(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged or unsafe file
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"'{path}' is not a plain state dict ({reason})", hint="download it again") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"'{path}' is not a plain state dict of tensors")
    return from_official(state, **_heads(path.parent))


def _heads(folder: Path) -> dict[str, Any]:
    """What config files beside an official checkpoint say that its tensors do not."""
    heads: dict[str, Any] = {}
    if (folder / "med_config.json").is_file():
        med = _read_json(folder / "med_config.json")
        if "num_attention_heads" in med:
            heads["text_heads"] = int(med["num_attention_heads"])
        heads["text_dropout"] = float(med.get("hidden_dropout_prob", 0.1))
    if (folder / "config.json").is_file():
        ours = _read_json(folder / "config.json")
        for key in ("vision_heads", "text_heads", "text_dropout", "prompt_ids", "pad_to"):
            if key in ours:
                heads[key] = ours[key]
    return heads


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"'{path}' is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"'{path}' is not a JSON object")
    return values


def _load_ours(path: Path) -> RewardModel:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{path}' is not a safetensors file or is damaged ({error})", hint="save or download it again"
        ) from error
    config_file = path.parent / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"there is no config.json beside '{path}'", hint="copy it from where the weights came")
    with torch.device("meta"):
        model = RewardModel(RewardModelConfig.from_dict(_read_json(config_file)))
    unused = {key.removeprefix("unused."): t for key, t in state.items() if key.startswith("unused.")}
    _fill(model, {key: t for key, t in state.items() if not key.startswith("unused.")}, str, [])
    model.unused = unused
    return model.eval()


def save_reward(model: RewardModel, folder: str | Path, *, layout: str = "safetensors") -> Path:
    """Write a model: "safetensors" is model.safetensors and config.json, "official" FS_model.pt and med_config.json.

    Returns the path of the weights; the folder is written whole or not at all. Both carry config.json, which has the
    numbers of heads.
    """
    from safetensors.torch import save_file

    if layout not in ("safetensors", "official"):
        raise UserError(f"layout is {layout!r}, expected safetensors or official")
    folder = Path(folder)
    name = "model.safetensors" if layout == "safetensors" else OFFICIAL_FILES[0]
    with replace_atomically(folder) as partial:
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        if layout == "safetensors":
            tensors = {key: t.detach().cpu().contiguous() for key, t in model.state_dict().items()}
            tensors |= {f"unused.{key}": t.cpu().clone().contiguous() for key, t in model.unused.items()}
            save_file(tensors, partial / name, {"format": "pt"})
        else:
            torch.save({key: t.detach().cpu() for key, t in official_state(model).items()}, partial / name)
            (partial / "med_config.json").write_text(json.dumps(_med_config(model.config), indent=2) + "\n")
    return folder / name


def _med_config(c: RewardModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": c.text_dropout,
        "hidden_act": "gelu",
        "hidden_dropout_prob": c.text_dropout,
        "hidden_size": c.text_width,
        "initializer_range": 0.02,
        "intermediate_size": c.text_mlp,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": c.positions,
        "model_type": "bert",
        "num_attention_heads": c.text_heads,
        "num_hidden_layers": c.text_depth,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": c.vocabulary,
        "encoder_width": c.vision_width,
        "add_cross_attention": True,
    }


def _list(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
