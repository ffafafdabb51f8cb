"""Build the one package that a tag names, `<name>-v<version>`, into dist/; refuse a tag that disagrees with the package.

python .ci/release.py gp-ensemble-v0.1.0
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def folder_of(tag: str) -> Path:
    """The folder of the package that the tag releases. Raises ValueError when tag and package disagree."""
    found = re.fullmatch(r"(?P<name>[a-z0-9-]+)-v(?P<version>\d+\.\d+\.\d+\S*)", tag)
    if not found:
        raise ValueError(f"tag '{tag}' is not <name>-v<version>")
    name = found["name"]
    folder = ROOT / "shared" if name == "tenfold-shared" else ROOT / "packages" / name
    sources = list(folder.glob("src/*/__init__.py"))
    if len(sources) != 1:
        raise ValueError(f"tag '{tag}' names '{name}', and there is no such package")
    version = re.search(r'^__version__ = "([^"]+)"', sources[0].read_text(encoding="utf-8"), re.MULTILINE)
    if version is None or version[1] != found["version"]:
        raise ValueError(
            f"tag '{tag}' disagrees with {name} {version and version[1]}; bump with hatch version, or move the tag"
        )
    if f"## {found['version']}" not in (folder / "CHANGELOG.md").read_text(encoding="utf-8"):
        raise ValueError(f"{name}/CHANGELOG.md has no section '## {found['version']}'")
    return folder


if __name__ == "__main__":
    try:
        folder = folder_of(sys.argv[1] if len(sys.argv) > 1 else "")
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not shutil.which("uv"):
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "uv"], check=True)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    subprocess.run(["uv", "build", "-o", ROOT / "dist", folder], check=True)
