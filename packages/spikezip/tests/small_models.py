"""Small models of every supported family, their inputs, and how to make a QANN of one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

torch.set_num_threads(1)

TEXT = {
    "input_ids": torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 7 + [0] * 2]),
}
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
COLOUR = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def timm_vit(act: type[nn.Module] = nn.ReLU, depth: int = 2, **kwargs: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=depth, num_heads=4, mlp_ratio=2,
        act_layer=act, **kwargs,
    ).eval()  # fmt: skip


def timm_deit() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    torch.manual_seed(0)
    return VisionTransformerDistilled(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=4
    ).eval()


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 2, 4, 32, 64, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    return model


def transformers_model(name: str, **extra: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": 3,
    }
    text = {"vocab_size": 40, "max_position_embeddings": 16, "pad_token_id": 1, **sizes}
    image = {"image_size": 8, "patch_size": 2, "num_channels": 1, **sizes}
    distil = {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "num_labels": 3}
    kind = {"ViT": image, "DeiT": image, "DistilBert": distil}.get(name, text)
    head = "ImageClassification" if kind is image else "SequenceClassification"
    config = getattr(transformers, f"{name}Config")(**{**kind, "initializer_range": 0.15, **extra})
    return getattr(transformers, f"{name}For{head}")(config).eval()


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "timm-vit": (timm_vit, IMAGES),
    "timm-vit-gelu": (lambda: timm_vit(nn.GELU, init_values=0.3), IMAGES),
    "timm-deit": (timm_deit, IMAGES),
    "torchvision-vit": (torchvision_vit, COLOUR),
    "transformers-vit": (lambda: transformers_model("ViT"), {"pixel_values": IMAGES}),
    "transformers-deit": (lambda: transformers_model("DeiT"), {"pixel_values": IMAGES}),
    "bert": (lambda: transformers_model("Bert"), TEXT),
    "roberta": (lambda: transformers_model("Roberta"), TEXT),
    "distilbert": (lambda: transformers_model("DistilBert"), TEXT),
    "electra": (lambda: transformers_model("Electra", embedding_size=32), TEXT),
    "albert": (lambda: transformers_model("Albert", embedding_size=16), TEXT),
}


def as_type(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, dict):
        return {k: as_type(v, dtype) for k, v in inputs.items()}
    return inputs.to(dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def calibrated(model: nn.Module, inputs: Any, **config: Any) -> nn.Module:
    from spikezip import QuantConfig, calibrate, quantize

    qann = quantize(model, QuantConfig(**config))
    calibrate(qann, [inputs], method="mse")
    return qann
