"""Every error a person can mend has a class; each is a `UserError`, so the command line answers in one line."""

from tenfold_shared.errors import UserError


class EncoderMismatchError(UserError):
    """The encoders or their dimensions are not those the classifier was fitted with."""


class PriorMissingError(UserError):
    """The classifier was fitted with zero-shot logits and is asked to predict without them."""


class ClassNameError(UserError):
    """A class has no text embedding of its name, or a name is there twice."""


class FeatureError(UserError):
    """A feature row is NaN, infinite or zero; the message names the encoder and the row."""


class CacheError(UserError):
    """A stored feature file or classifier is damaged; the message names the file."""


class NumericalError(UserError, ArithmeticError):
    """The kernel matrix stays indefinite after the largest jitter."""


class OutOfMemoryError(UserError, MemoryError):
    """The kernel matrix would not fit; the message has the estimate and the solvers that need less."""
