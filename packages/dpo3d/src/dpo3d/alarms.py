"""When one of the three D's is there: thresholds, and messages that name figure, cause and remedy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold_shared.errors import UserError

Record = dict[str, Any]
"""One evaluation of the monitor, as it is written to the log."""


@dataclass(frozen=True)
class Alarm:
    """One raised alarm."""

    kind: str
    """drop, degradation or dispersion."""
    step: int
    message: str


@dataclass(frozen=True)
class Alarms:
    """Thresholds of the alarms; a condition must hold at `patience` evaluations in a row."""

    drop_per_token: float = 1.0
    """Nats per token that the rejected answers have lost."""
    drop_sequence: float = 20.0
    """The same per sequence, where lengths are unknown (a monitor without a probe)."""
    drop_ratio: float = 10.0
    """|Δ−| over |Δ+|."""
    share: float = 0.0
    """Of the margin, what the chosen answers contributed; below it they have fallen."""
    margin: float = 1.0
    """Nats per sequence that the margin must have reached before its share counts."""
    drawdown: float = 0.1
    """Nats per token that the chosen answers have lost since their best."""
    self_ref: float = 0.5
    """Nats per token by which fresh samples have become less likely under the reference."""
    off_pair: float = 0.1
    """Growth of the mass outside the known answers."""
    patience: int = 2

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"patience is {self.patience}, expected 1 or more")

    def check(self, history: Sequence[Record], raised: Sequence[str] = ()) -> list[Alarm]:
        """Alarms whose condition held at the last `patience` records, without the kinds already raised."""
        recent = history[-self.patience :]
        if len(recent) < self.patience:
            return []
        conditions: dict[str, Callable[[Record, Record], str | None]] = {
            "drop": self._drop,
            "degradation": self._degradation,
            "dispersion": self._dispersion,
        }
        found = []
        for kind, condition in conditions.items():
            texts = [condition(record, history[0]) for record in recent]
            if kind not in raised and all(texts):
                found.append(Alarm(kind, recent[-1]["step"], f"{kind} at step {recent[-1]['step']}: {texts[-1]}"))
        return found

    def _drop(self, now: Record, first: Record) -> str | None:
        per_token, ratio = now.get("delta_rejected_per_token"), now.get("drop_ratio")
        fallen = (
            per_token < -self.drop_per_token if per_token is not None else now["delta_rejected"] < -self.drop_sequence
        )
        if not fallen or ratio is None or ratio <= self.drop_ratio:
            return None
        size = f"{-per_token:.2f} nats/token" if per_token is not None else f"{-now['delta_rejected']:.1f} nats"
        return (
            f"rejected answers lost {size}, {ratio:.0f} times what the chosen moved (limit {self.drop_ratio:g}). "
            "Cause: the gradient on π− grows as π− vanishes. "
            "Remedy: harmless alone while the chosen rise; else loss_type ipo or sppo_hard, a lower learning rate, on-policy pairs."
        )

    def _degradation(self, now: Record, first: Record) -> str | None:
        share, drawdown = now.get("chosen_share"), now.get("chosen_drawdown")
        parts = []
        if share is not None and share < self.share and now["delta_chosen"] - now["delta_rejected"] > self.margin:
            parts.append(f"chosen answers moved {now['delta_chosen']:+.2f} nats, share of the margin {share:.3f}")
        if drawdown is not None and drawdown > self.drawdown:
            parts.append(f"chosen answers are {drawdown:.2f} nats/token below their best (limit {self.drawdown:g})")
        if not parts:
            return None
        return (
            "; ".join(parts)
            + ". Cause: the loss only pushes the rejected down, its gradient on the chosen has vanished. "
            "Remedy: sft_gamma=0.25 with sft_reduction=token, or beta_rejected=0.02, or loss_type nca_pair or apo_zero."
        )

    def _dispersion(self, now: Record, first: Record) -> str | None:
        parts = []
        if (
            _both(now, first, "self_ref_logp")
            and (fall := first["self_ref_logp"] - now["self_ref_logp"]) > self.self_ref
        ):
            parts.append(f"fresh samples lost {fall:.2f} nats/token under the reference (limit {self.self_ref:g})")
        if (
            _both(now, first, "off_pair_mass")
            and (grown := now["off_pair_mass"] - first["off_pair_mass"]) > self.off_pair
        ):
            parts.append(f"mass outside the known answers grew by {grown:.2f} (limit {self.off_pair:g})")
        if not parts:
            return None
        return (
            "; ".join(parts) + ". Cause: the mass taken from the rejected goes to answers that are in no pair. "
            "Remedy: sft_gamma=0.25 with sft_reduction=token, fewer steps or a lower learning rate, and on-policy pairs with either."
        )


def _both(now: Record, first: Record, key: str) -> bool:
    return now.get(key) is not None and first.get(key) is not None


DEFAULT = Alarms()
