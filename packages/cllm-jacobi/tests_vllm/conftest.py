"""Real vLLM, one engine per subprocess: a second engine in one process fails to register its kernels."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PARTS = ("vllm", "torch", "cllm_jacobi")


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "vllm: needs the environment of `make vllm`")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    missing = [name for name in PARTS if importlib.util.find_spec(name) is None]
    for item in items:
        item.add_marker(pytest.mark.vllm)
        if missing:
            reason = f"missing in this environment: {', '.join(missing)} (run make vllm)"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def models(tmp_path_factory: Any) -> dict[str, str]:
    """Folders of the two trained models that come with the package."""
    driver = Path(__file__).parent / "driver.py"
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, str(driver), "save", "{}", str(folder)], check=True)
    return {kind: str(folder / kind) for kind in ("target", "consistent")}


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Any]:
    """Run a scenario of driver.py in a process of its own; gives its answer."""

    def run(scenario: str, **options: Any) -> Any:
        runtime = Path(sys.prefix) / "lib" / "libiomp5.so"
        env = {
            **os.environ,
            # The engine runs in a folder of its own, where a relative entry would lead nowhere.
            "PYTHONPATH": os.pathsep.join(
                str(Path(p).resolve()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p
            ),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        if runtime.exists():
            env["LD_PRELOAD"] = str(runtime)
        answer = tmp_path / "answer.json"
        command = [sys.executable, str(Path(__file__).parent / "driver.py"), scenario, json.dumps(options), str(answer)]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, cwd=tmp_path)
        assert answer.exists(), f"{scenario} ended with {result.returncode}:\n{result.stderr[-3000:]}"
        return json.loads(answer.read_text())

    return run
