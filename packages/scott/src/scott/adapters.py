"""One U-Net, several networks: which LoRA is switched on decides whether it is teacher, student, target or discriminator.

Frozen weights are shared, so the memory of a run is that of one model plus its adapters. With everything off the pass is
the untouched teacher's, bit for bit, whatever the adapters have learnt.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from tenfold_shared.errors import UserError
from torch import Tensor, nn

TEACHER = "off"
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
ALL_LAYERS = (
    *ATTENTION_LAYERS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class AdapterStates:
    """The LoRA adapters of a U-Net and the switch between them.

    unet: a diffusers U-Net (any module whose decoder is called `up_blocks`); frozen and put into evaluation mode here.
    """

    def __init__(self, unet: nn.Module):
        self.unet = unet.requires_grad_(False).eval()
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._trainable: list[nn.Parameter] = []
        self._layers: list[Any] = []
        self._state = TEACHER

    def add(
        self,
        name: str,
        rank: int,
        *,
        layers: Literal["all", "attention"] = "all",
        decoder_only: bool = False,
        trainable: bool = True,
        seed: int = 0,
    ) -> list[nn.Parameter]:
        """Add an adapter that changes nothing until it is trained; returns its float32 parameters.

        layers: every layer that LCM-LoRA adapts, or the attention projections. decoder_only: in the up blocks alone.
        trainable: False for an average, which is written to by hand.

        Raises UserError when the name is taken or the U-Net has no such layer.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer

        if name in self._parameters or name == TEACHER:
            raise UserError(f"the adapter '{name}' exists already")
        endings = ALL_LAYERS if layers == "all" else ATTENTION_LAYERS
        targets = [
            path
            for path, module in self.unet.named_modules()
            if path.endswith(endings)
            and isinstance(module, nn.Linear | nn.Conv2d | LoraLayer)
            and (not decoder_only or path.startswith("up_blocks."))
        ]
        if not targets:
            raise UserError(f"{type(self.unet).__name__} has no layer to adapt", hint="expected a diffusers U-Net")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), self.unet, name)
        own = [(path, p) for path, p in self.unet.named_parameters() if f".{name}." in path]
        for _, parameter in own:
            parameter.data = parameter.data.float()
        self._parameters[name] = [p.requires_grad_(trainable) for _, p in own]
        self._trainable += self._parameters[name] if trainable else []
        self._layers = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]
        self.use(TEACHER)
        return self._parameters[name]

    def use(self, state: str) -> None:
        """Switch to an adapter, or to the teacher (`off`). Raises UserError when there is no such adapter."""
        if state != TEACHER and state not in self._parameters:
            have = ", ".join(self._parameters) or "none"
            raise UserError(f"the U-Net has no adapter '{state}'", hint=f"adapters: {have}")
        for layer in self._layers:
            layer.enable_adapters(state != TEACHER)
            if state != TEACHER:
                layer.set_adapter(state, inference_mode=True)
        # Switching freezes whatever is not in use, and a frozen leaf silently loses the gradient of a pass made before.
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self._state = state

    @contextmanager
    def using(self, state: str) -> Iterator[nn.Module]:
        """`with states.using("student") as unet:`; the state before is restored afterwards."""
        before = self._state
        self.use(state)
        try:
            yield self.unet
        finally:
            self.use(before)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of one adapter, in a fixed order."""
        return self._parameters[name]

    def copy(self, source: str, to: str) -> None:
        """Copy the weights of one adapter to another of the same shape."""
        with torch.no_grad():
            for a, b in zip(self._parameters[to], self._parameters[source], strict=True):
                a.copy_(b)

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """One adapter in peft's naming, `up_blocks.0. ... .lora_A.weight`."""
        from peft import get_peft_model_state_dict

        return {
            key: value.detach().float().cpu().contiguous()
            for key, value in get_peft_model_state_dict(self.unet, adapter_name=name).items()
        }

    def load(self, name: str, weights: dict[str, Tensor]) -> None:
        """Load what `state_dict` gave. Raises UserError that lists keys which do not match."""
        from peft import set_peft_model_state_dict

        expected = self.state_dict(name)
        wrong = sorted(
            {*weights} ^ {*expected} | {k for k in {*weights} & {*expected} if weights[k].shape != expected[k].shape}
        )
        if wrong:
            raise UserError(f"LoRA weights do not match the U-Net: {', '.join(wrong[:5])} ({len(wrong)} in all)")
        set_peft_model_state_dict(self.unet, weights, adapter_name=name)


def count(parameters: list[nn.Parameter]) -> int:
    """Numbers in a list of parameters."""
    return sum(p.numel() for p in parameters)
