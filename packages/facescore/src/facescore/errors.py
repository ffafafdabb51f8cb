"""Every error a person can mend has a class; each is a `UserError`, so the command line answers in one line."""

from tenfold_shared.errors import UserError


class ImageError(UserError):
    """An image file that is missing, truncated or of a kind that is not a picture; the message names it."""


class NoFaceError(UserError):
    """No face was found and the caller asked for an error (`on_no_face="raise"`)."""


class InvalidBoxError(UserError):
    """A box that is not four finite numbers, or that holds nothing of the image."""


class CheckpointError(UserError):
    """A checkpoint whose keys or shapes are not those of the model; the message lists missing and unexpected keys."""


class TokenizerMissingError(UserError):
    """A prompt other than the model's own needs tokenizer files, and there are none."""


class DetectorUnavailableError(UserError, ImportError):
    """A face detector whose library or model file is not here; the message says what to install or pass."""


class PairFormatError(UserError):
    """A line of a pair or ranking file that cannot be used; the message has the line number."""


class TrainingError(UserError, ArithmeticError):
    """Training met a loss that is not finite; the message has the pair ids."""
