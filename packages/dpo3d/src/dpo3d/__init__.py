"""See, explain and mend what direct preference optimisation does to likelihoods (arXiv 2406.07327)."""

__version__ = "0.1.0"
