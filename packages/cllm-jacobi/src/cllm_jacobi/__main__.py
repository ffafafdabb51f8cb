"""`python -m cllm_jacobi`, which is what `accelerate launch -m cllm_jacobi train ...` runs."""

from cllm_jacobi.cli import app

app()
