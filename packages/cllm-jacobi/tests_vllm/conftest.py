"""Models for the tests on real vLLM."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory: Any) -> dict[str, str]:
    """Folders of the two trained models that come with the package."""
    driver = Path(__file__).parent / "driver.py"
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, str(driver), "save", "{}", str(folder)], check=True)
    return {kind: str(folder / kind) for kind in ("target", "consistent")}
