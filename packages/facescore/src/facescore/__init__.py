"""A reward model for generated faces."""

__version__ = "0.1.0"
