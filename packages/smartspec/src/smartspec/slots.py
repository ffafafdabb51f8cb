"""A causal transformers model that keeps many requests of different lengths in the rows of one cache.

Every forward pass names its rows and where each of them goes on. Rolling back costs nothing: the row's length is simply
not advanced, what lies beyond it is masked until it is overwritten.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tenfold_shared.errors import UserError
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from smartspec.errors import UnsupportedError


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: (slots, heads, max_len + 1, dim); the last column takes what padding writes."""

    def __init__(self, owner: "SlotModel") -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, length = self.owner.max_num_seqs, self.owner.max_len + 1
        self.keys, self.values = (
            torch.zeros(slots, s.shape[1], length, s.shape[3], dtype=s.dtype, device=s.device)
            for s in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns, width = self.owner.rows, self.owner.columns, self.owner.width
        out = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            store[rows[:, None], :, columns] = new.transpose(1, 2)
            whole = len(rows) == store.shape[0] and bool((rows == torch.arange(len(rows), device=rows.device)).all())
            out.append(store[:, :, :width] if whole else store[rows, :, :width])
        return out[0], out[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.width, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.owner.max_len


class SlotModel:
    """A causal model with `max_num_seqs` slots of `max_len` tokens.

    Raises UnsupportedError for models whose cache is no plain attention cache (recurrent layers, sliding windows shorter
    than max_len, encoder-decoders) and for lengths beyond the model's positions.
    """

    def __init__(self, model: Any, max_num_seqs: int, max_len: int) -> None:
        check_attention(model.config, max_len)
        self.model = model.eval()
        self.max_num_seqs = max_num_seqs
        self.max_len = max_len
        self.device = next(model.parameters()).device
        self.cache = Cache(layers=[_SlotLayer(self) for _ in range(model.config.get_text_config().num_hidden_layers)])
        self.rows = self.columns = torch.zeros(0, dtype=torch.long)
        self.width = 0

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @torch.inference_mode()
    def forward(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        ancestors: Tensor | None = None,
        hidden: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run tokens of several slots and write their keys and values.

        slots: (b,) rows. starts: (b,) where each row goes on. tokens: b lists, padded to the longest, w, inside.
        ancestors: (w, w) for a tree: which earlier tokens of this pass each token sees; a chain when not given.
        Returns (b, w, v) logits, and (b, w, d) last hidden states when asked for. Padding's rows mean nothing.
        """
        w = max(len(t) for t in tokens)
        lens = torch.tensor([len(t) for t in tokens], device=self.device)
        start = torch.tensor(starts, device=self.device)
        step = torch.arange(w, device=self.device)
        real = step < lens[:, None]
        self.rows = torch.tensor(slots, device=self.device)
        columns = start[:, None] + step
        self.columns = torch.where(real, columns, torch.full_like(columns, self.max_len))
        self.width = int((start + lens).max())
        key = torch.arange(self.width, device=self.device)
        if ancestors is None:
            positions = columns
            mask = key[None, None] <= columns[..., None]
        else:
            positions = start[:, None] + ancestors.to(self.device).sum(1) - 1
            inside = key[None] - start[:, None]
            own = ancestors.to(self.device)[:, inside.clamp(0, w - 1)].transpose(0, 1)
            mask = (inside < 0)[:, None] | (own & ((inside >= 0) & (inside < w))[:, None])
        # Padding sees the first key, so that no row of the softmax is empty.
        mask = torch.where(real[..., None], mask, key[None, None] == 0)
        padded = torch.zeros(len(tokens), w, dtype=torch.long)
        for row, t in enumerate(tokens):
            padded[row, : len(t)] = torch.as_tensor(t, dtype=torch.long)
        out = self.model(
            input_ids=padded.to(self.device),
            position_ids=torch.where(real, positions, torch.zeros_like(positions)),
            attention_mask=mask[:, None],
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=hidden,
        )
        return out.logits, out.hidden_states[-1] if hidden else None

    @torch.inference_mode()
    def move(self, slot: int, source: Sequence[int], start: int) -> None:
        """Close the gaps after a tree: the columns `source` of a slot become start, start + 1, ..."""
        index = torch.tensor(source, dtype=torch.long, device=self.device)
        target = torch.arange(start, start + len(source), device=self.device)
        for layer in self.cache.layers:
            for store in (layer.keys, layer.values):
                store[slot][:, target] = store[slot][:, index]


def check_attention(config: Any, max_len: int) -> None:
    """Raise UnsupportedError when a model cannot be rolled back by masking."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    if odd := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise UnsupportedError(
            f"{config.model_type} has {', '.join(odd)} layers, which cannot be rolled back",
            hint="speculate on models with full attention",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{config.model_type} is an encoder-decoder model", hint="use a causal model")
    window = getattr(text, "sliding_window", None)
    if window and (not kinds or "sliding_attention" in kinds) and window < max_len:
        raise UnsupportedError(
            f"{config.model_type} attends to a sliding window of {window} tokens, max_len is {max_len}",
            hint=f"pass max_len up to {window}",
        )
    limit = getattr(text, "max_position_embeddings", None)
    if limit and max_len > limit:
        raise UserError(f"max_len is {max_len}, the model has {limit} positions", hint=f"pass max_len up to {limit}")
