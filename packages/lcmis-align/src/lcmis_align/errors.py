"""What can go wrong by what a person gave."""

from tenfold_shared.errors import UserError


class PlanError(UserError):
    """A prompt could not be split into two concepts, or a plan lacks one."""


class PlannerError(UserError):
    """A planner gave no usable answer. `raw`: what it answered, as it came."""

    def __init__(self, message: str, hint: str | None = None, raw: str = ""):
        super().__init__(message, hint)
        self.raw = raw


class ScheduleError(UserError):
    """A prompt schedule cannot be read or does not fit the number of steps."""


class ScorerError(UserError):
    """A scorer returned something other than one finite number per image and text."""


class UnsupportedPipelineError(UserError, TypeError):
    """The pipeline cannot be stopped and gone on with."""


class IncompatiblePromptLength(UserError):
    """Two prompts that are to be mixed have encodings of different shapes."""


class DataError(UserError):
    """A prompt file or a results file is not what it should be."""
