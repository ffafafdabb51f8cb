"""Token-adaptive mixture-of-experts routing with null experts (arXiv 2406.13233).

The heavy names are imported when they are first used, so that `adamoe --help` answers at once.
"""

__version__ = "0.1.0"
