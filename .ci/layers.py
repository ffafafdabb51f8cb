"""Hold the workspace's import contracts with import-linter; the contracts are read off the folders.

In a package: cli -> demo -> testbed -> concepts. Between packages: nothing. The shared package imports no package.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

TOP = ("cli", "demo", "testbed")


def contracts(modules: dict[str, list[str]]) -> str:
    """The import-linter configuration. modules: package to the names of its modules."""
    lines = ["[importlinter]", "root_packages =", *(f"    {m}" for m in ["tenfold_shared", *modules])]

    def contract(id: str, kind: str, name: str, **lists: list[str]) -> None:
        lines.extend([f"[importlinter:contract:{id}]", f"type = {kind}", f"name = {name}"])
        for key, values in lists.items():
            lines.extend([f"{key} =", *(f"    {v}" for v in values)])

    contract("shared", "forbidden", "the shared package imports no package",
             source_modules=["tenfold_shared"], forbidden_modules=list(modules))  # fmt: skip
    if len(modules) > 1:
        contract("apart", "independence", "no package imports another", modules=list(modules))
    for package, names in modules.items():
        layers = [f"{package}.{layer}" for layer in TOP if layer in names]
        concepts = [f"{package}.{name}" for name in names if name not in TOP]
        contract(f"{package}-layers", "layers", f"{package}: cli -> demo -> testbed", layers=layers)
        if concepts:
            contract(f"{package}-concepts", "forbidden", f"{package}: concepts import no cli, demo or testbed",
                     source_modules=concepts, forbidden_modules=layers)  # fmt: skip
    return "\n".join(lines) + "\n"


def read(packages: Path) -> dict[str, list[str]]:
    found = {}
    for source in sorted(packages.glob("*/src/*/__init__.py")):
        entries = [p.stem for p in source.parent.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
        found[source.parent.name] = sorted(e for e in entries if e not in ("__init__", "__main__"))
    return found


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    with tempfile.NamedTemporaryFile("w", suffix=".ini") as config:
        config.write(contracts(read(root / "packages")))
        config.flush()
        command = [Path(sys.executable).parent / "lint-imports", "--config", config.name, "--no-cache"]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    print((result.stdout + result.stderr).strip() if result.returncode else result.stdout.strip().splitlines()[-1])
    sys.exit(result.returncode)
