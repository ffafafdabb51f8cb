"""`python -m scott`, which accelerate launches."""

from scott.cli import app

if __name__ == "__main__":
    app()
