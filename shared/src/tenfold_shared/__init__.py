"""What the ten Tenfold packages would otherwise each write again."""

__version__ = "0.1.0"
