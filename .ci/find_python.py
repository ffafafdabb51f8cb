"""Print an interpreter of the wanted version: on PATH, or one of pyenv's, which PATH shows only when selected."""

import shutil
import subprocess
import sys


def find(version: str) -> str | None:
    probe = "import sys; print(sys.executable, '.'.join(map(str, sys.version_info[:2])))"
    candidates = [f"python{version}", "python3"]
    if pyenv := shutil.which("pyenv"):
        for name in subprocess.run([pyenv, "versions", "--bare"], capture_output=True, text=True).stdout.split():
            prefix = subprocess.run([pyenv, "prefix", name], capture_output=True, text=True).stdout.strip()
            candidates.append(f"{prefix}/bin/python")
    for candidate in candidates:
        if not shutil.which(candidate):
            continue
        answer = subprocess.run([candidate, "-c", probe], capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.split()[-1] == version:
            return answer.stdout.rsplit(maxsplit=1)[0]
    return None


if __name__ == "__main__":
    found = find(sys.argv[1])
    print(
        found or f"no Python {sys.argv[1]} found; install it or pass PYTHON=3.12",
        file=sys.stdout if found else sys.stderr,
    )
    sys.exit(not found)
