"""Which text conditions which denoising step.

Two stages are the method's own: the first concept alone up to the switch step, then the whole prompt. The same object holds
any number of stages, texts that take turns, and texts that are mixed by weight, in their encodings or in what the denoiser
answers to each (the sum of scores of Composable Diffusion).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lcmis_align import syntax
from lcmis_align.errors import ScheduleError

if TYPE_CHECKING:
    from lcmis_align.sampling import Sampler, Snapshot

Weights = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Ramp:
    """A soft switch: within its stage the weight goes evenly from `first` to `then`."""

    first: str
    then: str


class PromptSchedule:
    """Texts and the steps that they condition.

    stages: pairs of a content and where it ends: a float is a share of all steps, an int a number of steps. The last stage
        goes on to the end. A content is a text, a list of texts that take turns, a mapping of texts to weights that sum to
        1, or a `Ramp`.
    mix: "embedding" mixes what weighted texts are encoded to; "score" mixes what the denoiser answers to each, at one
        denoiser evaluation per text.

        PromptSchedule([("a tea cup", 0.25), ("a tea cup of iced coke", 1.0)]).run(pipe, seeds=range(4))

    Raises ScheduleError when a stage ends before the one in front of it, a share is outside 0..1 or weights do not sum to 1.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str | Sequence[str] | Mapping[str, float] | Ramp, float | int]],
        *,
        mix: str = "embedding",
    ):
        if mix not in ("embedding", "score"):
            raise ScheduleError(f"mix is {mix!r}, expected 'embedding' or 'score'")
        if not stages:
            raise ScheduleError("the schedule has no stage, expected one or more")
        self.mix = mix
        self.stages = [(_checked(content), _when(until)) for content, until in stages]
        self._syntax: syntax.At | None = None
        self._text: str | None = None

    @classmethod
    def parse(cls, text: str) -> "PromptSchedule":
        """Read the web interfaces' notation, such as "[a tea cup:a tea cup of iced coke:0.25]" or "[a|b]".

        Raises ScheduleError, with the column, when brackets do not match.
        """
        schedule = cls([(text, 1.0)])
        schedule._syntax, schedule._text = syntax.parse(text), text
        return schedule

    @classmethod
    def composed(cls, texts: Mapping[str, float]) -> "PromptSchedule":
        """The sum of scores over all steps (Composable Diffusion): `{"a": 1, "b": 1, "": -1}`."""
        return cls([(texts, 1.0)], mix="score")

    def weights(self, total: int) -> list[Weights]:
        """The texts of each of `total` steps with their weights.

        Raises ScheduleError when a stage ends before the one in front of it.
        """
        if self._syntax is not None:
            return [((self._syntax(step, total), 1.0),) for step in range(total)]
        steps: list[Weights] = []
        for content, until in self.stages:
            stop = syntax.steps_until(until, total)
            if stop < len(steps):
                raise ScheduleError(f"a stage ends at step {stop} of {total}, before the one in front of it")
            start = len(steps)
            steps += [_at(content, step - start, stop - start) for step in range(start, stop)]
        content, missing = self.stages[-1][0], total - len(steps)
        return steps + [_at(content, len(steps) + i, total) for i in range(missing)]

    def calls(self, total: int) -> int:
        """Denoiser evaluations of one image."""
        return sum(len(weights) if self.mix == "score" else 1 for weights in self.weights(total))

    def run(
        self, pipe: Any, *, seeds: Sequence[int] = (0,), num_inference_steps: int = 40, batch_size: int = 4,
        **arguments: Any,
    ) -> list[Any]:  # fmt: skip
        """Draw one image per seed; the last batch may be smaller. arguments: the pipeline's own.

        Raises UnsupportedPipelineError, IncompatiblePromptLength and ScheduleError.
        """
        from lcmis_align.sampling import Sampler

        seeds, images = list(seeds), []
        for first in range(0, len(seeds), batch_size):
            sampler = Sampler(
                pipe, seeds[first : first + batch_size], num_inference_steps=num_inference_steps, **arguments
            )
            with sampler.remembering():
                images += list(sampler.decode(self.follow(sampler)))
        return images

    def follow(self, sampler: "Sampler") -> "Snapshot":
        """Take `sampler` through the whole schedule and return where it ends."""
        snapshot = sampler.begin()
        for weights, steps in groupby(self.weights(sampler.length)):
            snapshot = sampler.advance(snapshot, snapshot.step + len(list(steps)), weights, mix=self.mix)
        return snapshot

    def __str__(self) -> str:
        """The schedule in the web interfaces' notation.

        Raises ScheduleError when texts are mixed by weight, which the notation cannot say.
        """
        if self._text is not None:
            return self._text
        text = _notation(self.stages[-1][0])
        for content, until in reversed(self.stages[:-1]):
            text = f"[{_notation(content)}:{text}:{float(until)!r}]" if isinstance(until, float) else (
                f"[{_notation(content)}:{text}:{until}]"
            )  # fmt: skip
        return text

    def __repr__(self) -> str:
        return f"PromptSchedule({self._text or self.stages!r}, mix={self.mix!r})"


def _checked(content: Any) -> str | list[str] | dict[str, float] | Ramp:
    if isinstance(content, str | Ramp):
        return content
    if isinstance(content, Mapping):
        if abs(sum(content.values()) - 1) > 1e-6:
            raise ScheduleError(f"the weights of {list(content)} sum to {sum(content.values()):g}, expected 1")
        return dict(content)
    if isinstance(content, Sequence) and content and all(isinstance(text, str) for text in content):
        return list(content)
    raise ScheduleError(f"a stage holds {content!r}, expected a text, texts that take turns, weights or a Ramp")


def _when(until: Any) -> float | int:
    if isinstance(until, bool) or not isinstance(until, float | int) or not until >= 0:
        raise ScheduleError(f"a stage ends at {until!r}, expected a share in 0..1 or a number of steps")
    if isinstance(until, float) and until > 1:
        raise ScheduleError(f"a stage ends at the share {until:g}, expected 0..1", hint="give steps as an integer")
    return until


def _at(content: Any, step: int, length: int) -> Weights:
    if isinstance(content, str):
        return ((content, 1.0),)
    if isinstance(content, list):
        return ((content[step % len(content)], 1.0),)
    if isinstance(content, Ramp):
        share = step / length
        mixed: Weights = ((content.first, 1 - share), (content.then, share))
        return mixed if 0 < share < 1 else (mixed[int(share)],)
    return tuple(content.items())


def _notation(content: Any) -> str:
    if isinstance(content, str):
        return syntax.escape(content)
    if isinstance(content, list):
        return "[" + "|".join(syntax.escape(text) for text in content) + "]"
    raise ScheduleError("texts that are mixed by weight cannot be written in the web interfaces' notation")
