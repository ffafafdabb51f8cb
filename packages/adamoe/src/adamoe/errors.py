"""Every error a person can mend has a class; each is a `UserError`, so the command line answers in one line."""

from tenfold_shared.errors import UserError


class ConfigError(UserError):
    """A setting out of its range; the message names the value and the range."""


class ConversionError(UserError):
    """A model that cannot be converted, or was converted before."""


class UnknownFamilyError(UserError, KeyError):
    """A model type that no family is registered for."""


class CheckpointError(UserError):
    """A checkpoint whose null rows do not fit the settings, or whose layout is not the one asked for."""


class PluginError(UserError, RuntimeError):
    """Something the running vLLM cannot do with null experts."""
