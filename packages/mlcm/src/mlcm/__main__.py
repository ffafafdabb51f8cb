"""`python -m mlcm`, which `accelerate launch -m mlcm train ...` needs."""

from mlcm.cli import app

app()
