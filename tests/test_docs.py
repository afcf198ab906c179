"""The documentation does what it says: its code runs, its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import asgi_infer
import asgi_infer.workers

pytestmark = pytest.mark.unmeasured

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A fence of Python, and the fence of text behind it if there is one: what the code prints.
FENCE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    code: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def needs_ray(self) -> bool:
        return "\nimport ray\n" in self.code or "import RayWorker" in self.code

    def run(self) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "__main__"}
        # Padded, so that a traceback points at the line of the page.
        code = compile("\n" * self.line + self.code, str(self.page), "exec")
        exec(code, names)
        return names


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[1], match[2]))
    return found


@pytest.mark.parametrize("block", blocks()[1:], ids=str)  # the README's first is below
def test_every_block_of_python_runs(block: Block) -> None:
    """Each block runs by itself, and prints what stands behind it."""
    if block.needs_ray:
        run_with_ray(block)
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        names = block.run()
    if block.output is not None:
        assert printed.getvalue() == block.output
    if "app" in names:
        with TestClient(names["app"]) as client:
            assert client.get("/no-such-page").status_code == 404


def run_with_ray(block: Block) -> None:
    """In a process of its own: a cluster opens and closes things when it likes."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    from .workers import ray_cluster  # sets in the environment that it is to listen here only

    command = [sys.executable, "-W", "ignore", "-c", block.code]
    environment = os.environ | {"PYTHONPATH": str(ray_cluster.ROOT)}
    printed = subprocess.run(
        command, env=environment, timeout=55, check=True, capture_output=True, text=True
    )
    assert printed.stdout == (block.output or "")


def test_the_readme_shows_working_code_within_forty_lines() -> None:
    """The first block of the README is complete by line 40, and reads a real digit."""
    first = blocks()[0]
    assert first.page.name == "README.md"
    assert first.output is None
    assert first.line + first.code.count("\n") + 1 <= 40
    from sklearn.datasets import load_digits  # here, for it makes the start of a runner slow

    images, digits = load_digits(return_X_y=True)
    with TestClient(first.run()["app"]) as client:
        answers = [client.post("/predict", json=image.tolist()) for image in images[:10]]
        assert client.get("/no-such-page").status_code == 404
    assert [answer.json() for answer in answers] == digits[:10].tolist()
    assert "infer;dur=" in answers[0].headers["server-timing"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_the_project_leads_to_a_file(page: Path) -> None:
    """A relative link names a file that exists."""
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_reference_names_everything_that_is_public() -> None:
    """The reference page has a heading or a table row for each public name, for the figures of
    the statistics, and for the states of a runner."""
    text = (ROOT / "docs" / "reference.md").read_text()
    figures = [field.name for field in fields(asgi_infer.RunnerStatistics)]
    states = ["new", "loading", "ready", "broken", "draining", "closed", "failed"]
    for name in [*asgi_infer.__all__, *asgi_infer.workers.__all__, *figures, *states]:
        assert f"`{name}" in text, name
