"""The workspace's own scripts: the page of the demos, the import contracts, the release check."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A workspace of two packages; `good` has a demo that works and `bad` one that fails."""
    for name in ("good", "bad"):
        source = tmp_path / "packages" / name / "src" / name
        source.mkdir(parents=True)
        (source / "__init__.py").write_text('__version__ = "0.2.0"\n')
        for module in ("cli", "demo", "testbed", "kernels"):
            (source / f"{module}.py").write_text("")
        (tmp_path / "packages" / name / "pyproject.toml").write_text(f"[project]\nname = '{name}'\n")
        (tmp_path / "packages" / name / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0\n")
    return tmp_path


class TestDemo:
    @pytest.fixture
    def demo(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        summary = {
            "title": "T",
            "columns": ["a"],
            "rows": [["<1>"]],
            "figures": [{"file": "x.png", "caption": "C"}],
            "notes": [],
        }
        scripts = tree / "bin"
        scripts.mkdir()
        (scripts / "good").write_text(f"#!/bin/sh\ncat > $3/summary.json <<'E'\n{json.dumps(summary)}\nE\n")
        (scripts / "bad").write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
        for file in scripts.iterdir():
            file.chmod(0o755)
        module = script("demo")
        monkeypatch.setattr(module, "ROOT", tree)
        monkeypatch.setattr(module.sys, "executable", str(scripts / "python"))
        return module

    def run(self, demo: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> int:
        monkeypatch.setattr(demo.sys, "argv", ["demo.py", "--output", str(tree / "out"), *names])
        return demo.main()

    def test_a_failing_demo_is_named_and_does_not_stop_the_others(self, demo, tree, monkeypatch, capsys) -> None:
        assert self.run(demo, tree, monkeypatch, "bad", "good") == 1
        page = (tree / "out/index.html").read_text()
        assert "failed with exit status 3: broken" in page
        assert '<img src="good/x.png"' in page and "&lt;1&gt;" in page
        assert "bad failed with exit status 3: broken" in capsys.readouterr().out

    def test_all_well(self, demo, tree, monkeypatch) -> None:
        assert self.run(demo, tree, monkeypatch, "good") == 0

    def test_an_old_summary_is_no_proof(self, demo, tree, monkeypatch) -> None:
        (tree / "out/bad").mkdir(parents=True)
        (tree / "out/bad/summary.json").write_text("{}")
        assert self.run(demo, tree, monkeypatch, "bad") == 1

    def test_unknown_name(self, demo, tree, monkeypatch, capsys) -> None:
        assert self.run(demo, tree, monkeypatch, "ugly") == 2
        assert "there are bad, good" in capsys.readouterr().err


class TestBench:
    @pytest.fixture
    def bench(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        (tree / "benchmarks/results").mkdir(parents=True)
        (tree / "benchmarks/good.py").write_text(
            "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
        )
        (tree / "benchmarks/bad.py").write_text("raise SystemExit(3)\n")
        claims = [{"environment": {"seconds": seconds}} for seconds in (100.0, 100.0, 20.0)] + [{"environment": {}}]
        (tree / "benchmarks/results/good.json").write_text(json.dumps(claims))
        module = script("bench")
        monkeypatch.setattr(module, "ROOT", tree)
        return module

    def test_a_failing_benchmark_is_named_and_does_not_stop_the_others(
        self, bench, tree, monkeypatch, capfd: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setattr(bench.sys, "argv", ["bench.py", "bad", "good"])
        assert bench.main() == 1
        out = capfd.readouterr().out
        assert (tree / "benchmarks/good.ran").exists()
        assert "[1/2] bad ... about 17 min left in all" in out and "[2/2] good ... about 2 min left in all" in out
        assert out.rstrip().endswith("bad failed with exit status 3")

    def test_unknown_name(self, bench, monkeypatch, capsys) -> None:
        monkeypatch.setattr(bench.sys, "argv", ["bench.py", "ugly"])
        assert bench.main() == 2
        assert "there are bad, good" in capsys.readouterr().err


class TestLayers:
    def lint(self, tree: Path) -> subprocess.CompletedProcess:
        layers = script("layers")
        config = tree / "contracts.ini"
        config.write_text(layers.contracts(layers.read(tree / "packages")))
        command = [Path(sys.executable).parent / "lint-imports", "--config", config, "--no-cache"]
        path = os.pathsep.join(str(tree / "packages" / name / "src") for name in ("good", "bad"))
        return subprocess.run(command, cwd=tree, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})

    def test_arrows_one_way_are_kept(self, tree: Path) -> None:
        (tree / "packages/good/src/good/cli.py").write_text("import good.demo\n")
        (tree / "packages/good/src/good/testbed.py").write_text("import good.kernels\n")
        result = self.lint(tree)
        assert result.returncode == 0, result.stdout

    @pytest.mark.parametrize(
        ("module", "imported"), [("kernels", "good.testbed"), ("demo", "good.cli"), ("kernels", "bad.kernels")]
    )
    def test_arrows_the_other_way_are_broken(self, tree: Path, module: str, imported: str) -> None:
        (tree / f"packages/good/src/good/{module}.py").write_text(f"import {imported}\n")
        assert self.lint(tree).returncode == 1


class TestRelease:
    @pytest.fixture
    def release(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        module = script("release")
        monkeypatch.setattr(module, "ROOT", tree)
        return module

    def test_a_tag_names_one_package(self, release, tree) -> None:
        assert release.folder_of("good-v0.2.0") == tree / "packages/good"

    @pytest.mark.parametrize(
        ("tag", "reason"),
        [
            ("good-v0.3.0", "disagrees"),
            ("ugly-v0.2.0", "no such package"),
            ("good", "not <name>-v<version>"),
            ("../x-v0.2.0", "not"),
        ],
    )
    def test_a_tag_that_disagrees_is_refused(self, release, tag: str, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            release.folder_of(tag)

    def test_a_version_without_a_changelog_is_refused(self, release, tree) -> None:
        (tree / "packages/good/CHANGELOG.md").write_text("# Changelog\n")
        with pytest.raises(ValueError, match="CHANGELOG"):
            release.folder_of("good-v0.2.0")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("wheels")
    monkeypatch.setattr(module, "DIST", tmp_path)
    return module


class TestWheels:
    def test_tests_and_caches_are_unwanted_and_modules_with_such_names_are_not(self, wheels: ModuleType) -> None:
        wrong = [
            "toy/tests/a.py",
            "tests_vllm/driver.py",
            "toy/__pycache__/a.txt",
            "toy/a.pyc",
            "toy/test_a.py",
            "conftest.py",
        ]
        right = ["toy/testbed.py", "toy/latest.py", "toy/tester/a.py", "toy-0.1.0.dist-info/METADATA"]
        assert wheels.unwanted(right + wrong) == wrong

    def test_a_wheel_with_tests_and_a_missing_wheel_are_refused(self, wheels: ModuleType, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="holds 0 files"):
            wheels.check_contents("uv", "toy")
        (tmp_path / "toy-0.1.0.tar.gz").touch()
        with zipfile.ZipFile(tmp_path / "toy-0.1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("toy/tests/test_a.py", "")
        with pytest.raises(SystemExit, match=r"holds toy/tests/test_a\.py"):
            wheels.check_contents("uv", "toy")

    def test_what_fails_is_named_with_its_message(self, wheels: ModuleType) -> None:
        with pytest.raises(SystemExit, match="ended with 3: broken"):
            wheels.run(sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)")
