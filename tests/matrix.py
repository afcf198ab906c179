"""The test suite on every Python at hand, and on the oldest with the lowest dependencies.

Not a test: ``make test-matrix`` runs it. One that is not on this machine is skipped, and
said to be.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def interpreter(version: str) -> str | None:
    """A Python of that version: on the path, or among pyenv's."""
    home = Path.home() / ".pyenv" / "versions"
    candidates = [f"python{version}", *sorted(map(str, home.glob(f"{version}.*/bin/python")))]
    for candidate in candidates:
        path = shutil.which(candidate)
        probe = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if path and _output(probe) == version:
            return path
    return None


def lowest() -> list[str]:
    """The declared dependencies, each pinned to the lowest version it allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [re.sub(r">=([^,;]+).*", r"==\1", need) for need in project["dependencies"]]
    return [f"{pin}.*" if pin.count(".") == 1 else pin for pin in pins]


def run(version: str, python: str, *, pins: list[str]) -> bool:
    """Install into an environment of its own and run the tests; return whether they pass."""
    name = f".venv-{version}{'-lowest' if pins else ''}"
    pip = [f"{name}/bin/python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    steps = [
        [python, "-m", "venv", name],
        [*pip, "pip>=25.1"],
        [*pip, "--editable", ".[fastapi,trio]", "--group", "test", *pins],
        [f"{name}/bin/python", "-m", "pytest", "-q", "-m", "not soak", "-p", "no:cacheprovider"],
    ]
    return all(subprocess.run(step, cwd=ROOT, check=False).returncode == 0 for step in steps)


def main() -> int:
    """Run them all; print a line for each; the exit status says whether all passed."""
    results: dict[str, str] = {}
    for version in VERSIONS:
        python = interpreter(version)
        if python is None:
            results[version] = "not on this machine"
            continue
        results[version] = "passed" if run(version, python, pins=[]) else "FAILED"
        if version == VERSIONS[0]:
            passed = run(version, python, pins=lowest())
            results[f"{version}, lowest dependencies"] = "passed" if passed else "FAILED"
    for name, result in results.items():
        print(f"{name:30} {result}")
    return 1 if "FAILED" in results.values() else 0


def _output(command: list[str | None]) -> str:
    done = subprocess.run(
        [part for part in command if part], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
