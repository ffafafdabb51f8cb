"""`python -m adamoe`, for launchers."""

from adamoe.cli import app

app()
