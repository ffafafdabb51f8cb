"""Frozen encoders of the common libraries, each a function from RGB images to features.

    timm:MODEL            timm, e.g. timm:vit_small_patch14_dinov2.lvd142m
    open_clip:MODEL/TAG   open_clip, e.g. open_clip:RN50/openai
    transformers:ID       a hub id or a folder, e.g. transformers:facebook/dinov2-small
    torchvision:MODEL     torchvision, e.g. torchvision:resnet50

`@FILE` behind any but transformers' loads the weights from a file instead: safetensors, or a checkpoint read with
`weights_only`; prefixes as MoCo and DINO write them are taken off and the classification head is dropped.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_model

from gp_ensemble.zero_shot import ZeroShotClassifier, projected

PREFIXES = ("module.", "encoder_q.", "base_encoder.", "momentum_encoder.", "backbone.", "model.")
CHECKPOINTS = (".bin", ".pt", ".pth", ".safetensors")
HEADS = ("fc.", "head.", "heads.", "classifier.", "projector.", "predictor.")


class Extractor:
    """One frozen encoder. Calling it with RGB images gives their features (n, d), float32."""

    name: str
    fingerprint: str
    """Changes with the model, its weights and its transform."""

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        raise NotImplementedError

    def zero_shot(self, names: Sequence[str], *, templates: Sequence[str] | None = None) -> ZeroShotClassifier:
        """The classifier of the text tower. Raises UserError for a model that has none."""
        raise UserError(f"encoder '{self.name}' has no text tower", hint="take a CLIP or SigLIP model as the prior")


class _TorchExtractor(Extractor):
    """A torch module behind a transform."""

    def __init__(
        self, name: str, model: torch.nn.Module, transform: Callable[[Image.Image], torch.Tensor], device: str
    ):
        self.name = name
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self.transform = transform
        self.fingerprint = fingerprint(model, transform)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        batch = torch.stack([self.transform(image) for image in images]).to(self.device)
        return self._encode(batch).float().cpu().numpy()

    def _encode(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)


class TimmExtractor(_TorchExtractor):
    """A timm model without its head. checkpoint: a file of weights; the library's own when None."""

    def __init__(
        self,
        name: str,
        model: str,
        *,
        checkpoint: str | Path | None = None,
        pretrained: bool = True,
        device: str = "cpu",
    ):
        import timm

        if model not in timm.list_models() and not timm.is_model(model.split(".")[0]) and "hub" not in model:
            raise UserError(f"timm has no model '{model}'", hint="timm.list_models() names them")
        use_own = pretrained and checkpoint is None
        network = reachable(model, lambda: timm.create_model(model, pretrained=use_own, num_classes=0))
        if checkpoint is not None:
            load_checkpoint(network, checkpoint)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
        super().__init__(name, network, transform, device)


class OpenClipExtractor(_TorchExtractor):
    """An open_clip model: `encode_image`, and the text tower for the prior."""

    def __init__(self, name: str, model: str, *, pretrained: str | None = None, device: str = "cpu"):
        import open_clip

        if "hf-hub:" not in model and model not in open_clip.list_models():
            raise UserError(f"open_clip has no model '{model}'", hint="open_clip.list_models() names them")
        is_file = pretrained is not None and ("/" in pretrained or Path(pretrained).suffix in CHECKPOINTS)
        if is_file and not Path(str(pretrained)).is_file():
            raise UserError(f"checkpoint '{pretrained}' does not exist")
        network, _, transform = reachable(
            f"{model}/{pretrained}", lambda: open_clip.create_model_and_transforms(model, pretrained=pretrained)
        )
        self.tokenizer = open_clip.get_tokenizer(model)
        super().__init__(name, network, transform, device)

    def _encode(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(batch)

    def zero_shot(self, names: Sequence[str], *, templates: Sequence[str] | None = None) -> ZeroShotClassifier:
        return ZeroShotClassifier.from_open_clip(
            self.model, self.tokenizer, names=names, templates=templates, encoder=self.name
        )


class TransformersExtractor(Extractor):
    """A vision or vision-language model of transformers, from a hub id or a folder.

    pool: "cls" (first token), "mean" (of all tokens), "pooler" (the model's own); CLIP-like models give their projected
    image embedding instead. auto: the projection where there is one, else the pooler, else the mean.
    """

    def __init__(self, name: str, model: str, *, pool: str = "auto", device: str = "cpu"):
        from transformers import AutoImageProcessor, AutoModel

        if pool not in ("auto", "cls", "mean", "pooler"):
            raise UserError(f"pool is {pool!r}, expected auto, cls, mean or pooler")
        self.name, self.pool, self.source = name, pool, model
        self.device = torch.device(device)
        self.model = load_model(AutoModel, model).eval().to(self.device)
        self.processor = load_model(AutoImageProcessor, model)
        self.fingerprint = fingerprint(self.model, f"{self.processor} {pool}")

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        if self.pool == "auto" and hasattr(self.model, "get_image_features"):
            return projected(self.model.get_image_features(pixel_values=pixels)).float().cpu().numpy()
        vision = getattr(self.model, "vision_model", self.model)
        output = vision(pixel_values=pixels)
        pooler = getattr(output, "pooler_output", None)
        if self.pool == "pooler" and pooler is None:
            raise UserError(f"model '{self.source}' has no pooler", hint="use pool='cls' or 'mean'")
        if self.pool in ("auto", "pooler") and pooler is not None:
            return pooler.flatten(1).float().cpu().numpy()
        tokens = output.last_hidden_state
        if tokens.ndim == 4:  # convolutional: (n, channels, height, width)
            tokens = tokens.flatten(2).mT
        return (tokens[:, 0] if self.pool == "cls" else tokens.mean(1)).float().cpu().numpy()

    def zero_shot(self, names: Sequence[str], *, templates: Sequence[str] | None = None) -> ZeroShotClassifier:
        from tenfold_shared.hub import load_tokenizer

        if not hasattr(self.model, "get_text_features"):
            return super().zero_shot(names)
        return ZeroShotClassifier.from_transformers(
            self.model, load_tokenizer(self.source), names=names, templates=templates, encoder=self.name
        )


class TorchvisionExtractor(_TorchExtractor):
    """A classification model of torchvision without its head."""

    def __init__(
        self,
        name: str,
        model: str,
        *,
        checkpoint: str | Path | None = None,
        pretrained: bool = True,
        device: str = "cpu",
    ):
        from torchvision import models

        if model not in models.list_models(module=models):
            raise UserError(f"torchvision has no model '{model}'", hint="torchvision.models.list_models() names them")
        weights = models.get_model_weights(model).DEFAULT
        use_own = weights if pretrained and checkpoint is None else None
        network = reachable(model, lambda: models.get_model(model, weights=use_own))
        for head in ("fc", "classifier", "heads", "head"):
            if hasattr(network, head):
                setattr(network, head, torch.nn.Identity())
        if checkpoint is not None:
            load_checkpoint(network, checkpoint)
        super().__init__(name, network, weights.transforms(), device)

    def _encode(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch).flatten(1)


class CallableExtractor(Extractor):
    """Any function from RGB images to (n, d). version: of the function, for the cache."""

    def __init__(self, name: str, function: Callable[[Sequence[Image.Image]], Any], *, version: str):
        self.name, self.function, self.fingerprint = name, function, f"callable {version}"

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        return np.asarray(self.function(images), dtype=np.float32)


def make_extractor(text: str, *, device: str = "cpu") -> Extractor:
    """An extractor from `name=library:model`, e.g. `dino=timm:vit_small_patch14_dinov2.lvd142m`. Raises UserError."""
    name, separator, rest = text.partition("=")
    library, colon, model = rest.partition(":")
    if not (separator and colon and name and model):
        raise UserError(
            f"encoder '{text}'", hint="expected NAME=LIBRARY:MODEL, e.g. dino=timm:vit_small_patch14_dinov2.lvd142m"
        )
    model, at, file = model.partition("@")
    checkpoint = file if at else None
    if library == "timm":
        return TimmExtractor(name, model, checkpoint=checkpoint, device=device)
    if library == "torchvision":
        return TorchvisionExtractor(name, model, checkpoint=checkpoint, device=device)
    if library == "transformers":
        return TransformersExtractor(name, model, device=device)
    if library == "open_clip":
        hub = model.startswith("hf-hub:")
        model, _, tag = (model, "", "") if hub else model.partition("/")
        if not (hub or tag or checkpoint):
            raise UserError(
                f"encoder '{text}' has no weights", hint="write open_clip:MODEL/TAG, e.g. open_clip:RN50/openai"
            )
        return OpenClipExtractor(name, model, pretrained=checkpoint or tag or None, device=device)
    raise UserError(f"library '{library}'", hint="expected timm, open_clip, transformers or torchvision")


def load_checkpoint(model: torch.nn.Module, path: str | Path) -> None:
    """Load weights from a file into a model without a head. Raises UserError when they do not fit."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Unpickling, zip and safetensors errors have no class in common.
        raise UserError(f"checkpoint '{path}' cannot be read ({str(error).splitlines()[0][:120]})") from error
    state = strip(state)
    own = model.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.startswith(HEADS)}
    wrong = [k for k in own if k not in state or state[k].shape != own[k].shape]
    if wrong:
        raise UserError(
            f"checkpoint '{path}' does not fit: {len(wrong)} of {len(own)} tensors are missing or of another shape, "
            f"first {wrong[0]}",
            hint="name the model that the checkpoint was trained as",
        )
    model.load_state_dict({k: state[k] for k in own})


def strip(state: Any) -> dict[str, torch.Tensor]:
    """The tensors of the online encoder in a MoCo or DINO checkpoint, under the backbone's own names."""
    for key in ("state_dict", "teacher", "student", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    # MoCo keeps two encoders and a queue in one file; the online one is what was trained.
    online = [
        p
        for p in ("module.encoder_q.", "encoder_q.", "module.base_encoder.", "base_encoder.")
        if any(k.startswith(p) for k in tensors)
    ]
    if online:
        tensors = {k: v for k, v in tensors.items() if k.startswith(online[0])}
    stripped = {}
    for key, value in tensors.items():
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        stripped[key] = value
    return stripped


def reachable(name: str, load: Callable[[], Any]) -> Any:
    """What `load` gives, or one clear line when its weights can neither be found nor downloaded."""
    try:
        return load()
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(
            f"the weights of '{name}' could not be loaded ({reason})",
            hint="check the name and the network, or give a file with @FILE",
        ) from error


def fingerprint(model: torch.nn.Module, transform: Any) -> str:
    """Digest of a model's weights and of how its transform prints."""
    digest = hashlib.sha256(f"{type(model).__name__}\0{transform}".encode())
    for key, value in model.state_dict().items():
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
