"""The errors of this package: each names what was given, what was expected and the mend."""

from tenfold_shared.errors import UserError


class ProfileError(UserError):
    """A profile that no cost model can be fitted on, or that belongs to another model or machine."""


class PairError(UserError):
    """A target and a draft that cannot work together: other vocabularies, other tokenizers."""


class UnsupportedError(UserError):
    """Something the engine or the running vLLM cannot do with speculation."""
