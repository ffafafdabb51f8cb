"""What both worlds need to pass for a Stable Diffusion: an autoencoder that does nothing, a tokenizer of whole words, a pipeline."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lcmis_align.errors import ScorerError


class IdentityVAE(ModelMixin, ConfigMixin):
    """Latents are pixels: `decode` returns what it is given."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, channels: int = 3):
        super().__init__()
        self.register_to_config(block_out_channels=[channels], scaling_factor=1.0, latent_channels=channels)
        self.unused = torch.nn.Parameter(torch.zeros(1))  # a module without parameters has no dtype

    def decode(self, latents: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """latents: (batch, channels, height, width), returned as they are."""
        return DecoderOutput(latents) if return_dict else (latents,)


def word_tokenizer(words: Sequence[str], length: int) -> PreTrainedTokenizerFast:
    """A tokenizer that knows `words` alone and pads to `length` slots, begin and end included."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<begin>", "<end>", "<unknown>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [(name, vocabulary[name]) for name in ("<begin>", "<end>")]
    tokenizer.post_processor = TemplateProcessing(single="<begin> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<begin>", eos_token="<end>", unk_token="<unknown>",
        model_max_length=length,
    )  # fmt: skip


def named_word(text: str, words: Sequence[str]) -> str:
    """The first of `words` in `text`. Raises ScorerError when there is none."""
    for word in text.lower().split():
        if word in words:
            return word
    raise ScorerError(f"this world's judge knows nothing of {text!r}", hint=f"it knows {', '.join(words)}")


def assemble(
    unet: Any, text_encoder: Any, tokenizer: Any, scheduler: Any, loader: Any = StableDiffusionPipeline
) -> Any:
    """A real diffusers pipeline around the parts; quiet, without a safety checker."""
    pipe = loader(
        vae=IdentityVAE(unet.config.in_channels), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
