"""pytest plug-in of the tests on real vLLM: `engine` runs a scenario of the package's driver.py in a process of its own.

A second engine in one process fails to register its kernels.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    package = config.rootpath.parent.name.replace("-", "_")
    missing = [name for name in ("vllm", "torch", package) if importlib.util.find_spec(name) is None]
    if missing:
        for item in items:
            reason = f"missing in this environment: {', '.join(missing)} (run make vllm)"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run a scenario of driver.py with its options; gives the answer that it writes as JSON."""
    driver = request.path.parent / "driver.py"
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **({"LD_PRELOAD": str(openmp)} if openmp.exists() else {}),
    }

    def run(scenario: str, **options: Any) -> Any:
        answer = tmp_path / "answer.json"
        answer.unlink(missing_ok=True)
        command = [sys.executable, driver, scenario, json.dumps(options), answer]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)
        assert answer.exists(), f"{scenario} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        return json.loads(answer.read_text())

    return run
