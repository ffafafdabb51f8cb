"""Real vLLM, one engine per subprocess: a second engine in one process fails to register its kernels."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = {"vllm": "vllm", "torch": "torch", "smartspec": "smartspec"}


def pytest_configure(config):
    config.addinivalue_line("markers", "vllm: needs the environment of `make vllm`")


def pytest_collection_modifyitems(items):
    missing = [name for name, module in PARTS.items() if importlib.util.find_spec(module) is None]
    for item in items:
        item.add_marker(pytest.mark.vllm)
        if missing:
            item.add_marker(
                pytest.mark.skip(reason=f"missing in this environment: {', '.join(missing)} (run make vllm)")
            )


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a tiny target and of a draft that often agrees with it."""
    from smartspec import testbed

    folder = tmp_path_factory.mktemp("pair")
    testbed.save(testbed.load("target"), folder / "target")
    testbed.save(testbed.with_noise(testbed.load("draft"), 2.0), folder / "draft")
    return {"target": str(folder / "target"), "draft": str(folder / "draft")}


@pytest.fixture
def engine(tmp_path):
    """Run a scenario of driver.py in a process of its own; gives its answer."""

    def run(scenario, **options):
        runtime = Path(sys.prefix) / "lib" / "libiomp5.so"
        env = {
            **os.environ,
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
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, cwd=tmp_path)
        assert answer.exists(), f"{scenario} ended with {result.returncode}:\n{result.stderr[-3000:]}"
        return json.loads(answer.read_text())

    return run
