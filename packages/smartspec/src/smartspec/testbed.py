"""The offline world: a language of phrases, a trained target and draft, and knobs for cost and acceptance.

The two models come with the package (`assets/`, float16); `python -m smartspec.testbed` trains them anew from nothing in
about 40 seconds of one core. `with_ballast` makes the target expensive without changing its function, `with_noise` makes
the draft worse, so that cost and acceptance are set apart from each other.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tenfold_shared.errors import UserError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 512
ASSETS = Path(__file__).parent / "assets"
SHAPES = {
    "target": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
    "draft": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2},
}
RECIPES = {"target": (160, 5e-3), "draft": (240, 6e-3)}


def corpus(tokens: int, *, seed: int = 0, language_seed: int = 0) -> NDArray[Any]:
    """(tokens,) ids of a text: 120 phrases of 4 to 9 tokens, each followed by one of three others (.75, .15, .10), with 5 %
    of jumps to any phrase."""
    words = np.random.default_rng(language_seed)
    phrases = [words.integers(2, VOCAB, words.integers(4, 10)) for _ in range(120)]
    after = np.array([words.choice(120, 3, replace=False) for _ in range(120)])
    rng = np.random.default_rng([seed, 1])
    out: list[int] = []
    at = int(rng.integers(120))
    while len(out) < tokens:
        out.extend(phrases[at].tolist())
        at = int(rng.integers(120)) if rng.random() < 0.05 else int(after[at][rng.choice(3, p=[0.75, 0.15, 0.10])])
    return np.array(out[:tokens])


def prompts(count: int, length: int = 24, *, seed: int = 0) -> list[list[int]]:
    """Prompts from the language, each its own piece of text."""
    text = corpus(count * length * 3, seed=seed + 1000)
    starts = np.random.default_rng([seed, 2]).integers(0, len(text) - length, count)
    return [text[s : s + length].tolist() for s in starts]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the language: one token a word, w2 to w511 after the two special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    # A special token named like a word would be found inside longer words.
    words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def untrained(kind: str, *, seed: int = 0) -> LlamaForCausalLM:
    """A fresh "target" or "draft"."""
    if kind not in SHAPES:
        raise UserError(f"no testbed model '{kind}'", hint="use target or draft")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=1024, num_key_value_heads=SHAPES[kind]["num_attention_heads"],
        bos_token_id=None, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False, **SHAPES[kind],
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def train(kind: str, *, steps: int | None = None, seed: int = 0) -> LlamaForCausalLM:
    """Train a model of the language: 24 x 64 tokens a step, AdamW, cosine schedule."""
    model = untrained(kind, seed=seed).train()
    planned, rate = RECIPES[kind]
    steps = steps or planned
    text = torch.from_numpy(corpus(200_000, seed=seed))
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - 64, (24,), generator=generator)
        batch = torch.stack([text[s : s + 64] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def load(kind: str) -> LlamaForCausalLM:
    """The trained "target" or "draft" that comes with the package, in float32."""
    from safetensors.torch import load_file

    model = untrained(kind)
    state = load_file(ASSETS / f"{kind}.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def with_ballast(model: LlamaForCausalLM, *, layers: int = 12, width: int = 8192) -> LlamaForCausalLM:
    """The same function at a higher price: `layers` more layers whose outputs are zero, and MLPs `width` wide."""
    config = LlamaConfig(**{
        **model.config.to_dict(),
        "num_hidden_layers": model.config.num_hidden_layers + layers,
        "intermediate_size": width,
    })  # fmt: skip
    torch.manual_seed(0)
    heavy = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in heavy.model.layers[model.config.num_hidden_layers :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        own = model.state_dict()
        for name, tensor in heavy.state_dict().items():
            if name not in own:
                continue
            if tensor.shape != own[name].shape:
                # The extra columns of the MLP meet zero rows, so they add nothing.
                tensor.zero_()
            tensor[tuple(slice(n) for n in own[name].shape)] = own[name]
    return heavy


def with_noise(model: LlamaForCausalLM, scale: float, *, seed: int = 0) -> LlamaForCausalLM:
    """A worse draft: normal noise of `scale` standard deviations of each MLP output matrix is added to it."""
    twin = LlamaForCausalLM(model.config).eval()
    twin.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in twin.model.layers:
            weight = layer.mlp.down_proj.weight
            weight.add_(scale * weight.std() * torch.randn(weight.shape, generator=generator))
    return twin


def save(model: LlamaForCausalLM, folder: str | Path) -> Path:
    """Write a model with the language's tokenizer, as `from_pretrained` and vLLM read it."""
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, *, tokens: int = 2000, seed: int = 5) -> float:
    """Share of positions of a text at which both have the same most likely token."""
    text = torch.from_numpy(corpus(tokens, seed=seed)).reshape(-1, 50)
    with torch.inference_mode():
        same = target(text).logits.argmax(-1) == draft(text).logits.argmax(-1)
    return float(same[:, 8:].float().mean())


def rebuild(folder: Path = ASSETS, *, steps: int | None = None) -> None:
    """Train both models from nothing and write them as float16."""
    from safetensors.torch import save_file
    from tenfold_shared.hub import replace_atomically

    for kind in SHAPES:
        model = train(kind, steps=steps)
        with replace_atomically(folder / f"{kind}.safetensors") as partial:
            save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, partial)


if __name__ == "__main__":
    rebuild(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS)
