"""Models for the tests on real vLLM."""

import pytest


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a tiny target and of a draft that often agrees with it."""
    from smartspec import testbed

    folder = tmp_path_factory.mktemp("pair")
    testbed.save(testbed.load("target"), folder / "target")
    testbed.save(testbed.with_noise(testbed.load("draft"), 2.0), folder / "draft")
    return {"target": str(folder / "target"), "draft": str(folder / "draft")}
