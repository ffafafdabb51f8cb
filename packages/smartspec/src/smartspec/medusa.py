"""Medusa heads: small layers on the target's last hidden state, head j guessing the token j + 2 positions ahead.

Checkpoint layout of the official releases: keys `{j}.{i}.linear.weight`, `{j}.{i}.linear.bias` for the residual blocks
i = 0, 1, ... of head j and `{j}.{blocks}.weight` for its output matrix, with or without a leading `medusa_head.`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tenfold_shared.errors import UserError
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class MedusaHeads(nn.Module):
    """heads: how many. width: of the hidden state. vocab_size: of the target. blocks: residual blocks in each head."""

    def __init__(self, heads: int, width: int, vocab_size: int, blocks: int = 1) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(*(_Block(width) for _ in range(blocks)), nn.Linear(width, vocab_size, bias=False))
            for _ in range(heads)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(b, d) hidden states to (b, heads, v) logits."""
        return torch.stack([head(hidden) for head in self.heads], dim=1)

    @staticmethod
    def from_state_dict(state: dict[str, Tensor]) -> "MedusaHeads":
        """Read the official layout. Raises UserError when keys or shapes do not make heads."""
        state = {key.removeprefix("medusa_head."): value for key, value in state.items()}
        try:
            heads = 1 + max(int(key.split(".")[0]) for key in state)
            blocks = max(int(key.split(".")[1]) for key in state)
            vocab_size, width = state[f"0.{blocks}.weight"].shape
            model = MedusaHeads(heads, width, vocab_size, blocks)
            model.heads.load_state_dict(state)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"the state dict does not hold Medusa heads ({reason})") from error
        return model.to(next(iter(state.values())).dtype)

    @staticmethod
    def load(path: str | Path) -> "MedusaHeads":
        """Read `medusa_lm_head.safetensors` or `medusa_lm_head.pt` (weights only), or a folder that holds one of them."""
        path = Path(path)
        if path.is_dir():
            found = [path / f"medusa_lm_head.{suffix}" for suffix in ("safetensors", "pt")]
            path = next((f for f in found if f.exists()), found[0])
        if not path.exists():
            raise UserError(f"{path} does not exist", hint="pass medusa_lm_head.safetensors or its folder")
        try:
            read = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        except Exception as error:
            raise UserError(f"{path} could not be read as Medusa heads ({error})") from error
        return MedusaHeads.from_state_dict(read)
