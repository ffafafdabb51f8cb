"""`python -m dpo3d`, which `accelerate launch -m dpo3d` needs."""

from dpo3d.cli import app

if __name__ == "__main__":
    app()
