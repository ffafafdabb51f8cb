"""`python -m facescore`, for `accelerate launch -m facescore`."""

from facescore.cli import app

app()
