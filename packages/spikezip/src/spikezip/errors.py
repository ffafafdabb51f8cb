"""What can go wrong, by stage; every message names the module path where there is one."""

from tenfold_shared.errors import UserError


class QuantizationError(UserError):
    """The model cannot be quantised: nothing to quantise, or an attention that cannot be intercepted."""


class UncalibratedError(UserError, RuntimeError):
    """A quantiser was used before its step size was set."""


class ConversionError(UserError):
    """The quantised model cannot become a spiking one as it is."""


class StateError(UserError, RuntimeError):
    """A spiking model's state does not fit what it is asked to do."""


class CheckpointError(UserError):
    """A checkpoint does not hold what it should."""


class ExportError(UserError):
    """A part of the model has no counterpart in the export format."""


class NotConvergedWarning(UserWarning):
    """A run ended before equilibrium."""
