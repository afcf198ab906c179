"""Facts about child processes: how their ends are told, and that none outlives its block."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from asgi_infer.doctor import _process
from asgi_infer.doctor._process import Child, ChildError, ChildFailed

from ..gates import LIMIT
from ..polling import until_true
from . import models

ROOT = str(Path(__file__).parents[2])


def child(tmp_path: Path, call: str, *, sample: str = "row", patience: float = LIMIT) -> Child:
    """A first try of that call."""
    target = {
        "model": f"{models.__name__}:Model",
        "call": call,
        "sample": f"{models.__name__}:{sample}",
        "app_dir": ROOT,
    }
    job: dict[str, Any] = {
        "role": "preflight",
        "target": target,
        "sample": str(tmp_path / "sample.pickle"),
    }
    return Child(job, patience=patience)


def test_what_the_model_prints_is_no_answer(tmp_path: Path) -> None:
    """The model's own output does not get between the lines of JSON."""
    with child(tmp_path, "talk") as talking:
        assert talking.ask()["sample_is_made"] is False


def test_a_failure(tmp_path: Path) -> None:
    """The reason that the child gives is raised."""
    with child(tmp_path, "fail") as failing, pytest.raises(ChildFailed, match="shapes differ"):
        failing.ask()


def test_a_crash(tmp_path: Path) -> None:
    """The signal that ended a child is named, and what it wrote last."""
    with child(tmp_path, "crash") as crashing:
        with pytest.raises(ChildError, match=r"^the process was killed by SIGSEGV$"):
            crashing.ask()
        assert str(crashing.error("silence")) == "the process was killed by SIGSEGV"
        crashing.tell()  # nobody hears it


def test_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that does not answer in time is told, and is ended all the same."""
    monkeypatch.setattr(_process, "_GRACE", 0.1)
    ticks: list[int] = []
    with child(tmp_path, "hang", patience=0.1) as hanging:
        with pytest.raises(ChildError, match=r"the process hung: no answer for 0.2 s"):
            hanging.ask(every=0.05, meanwhile=lambda: ticks.append(1), more=0.1)
        assert str(hanging.error("it is late")) == "it is late"
    assert ticks
    assert not psutil.pid_exists(hanging.pid)


def test_a_child_that_does_not_end_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is still busy after its grace is killed."""
    monkeypatch.setattr(_process, "_GRACE", 0.1)
    with child(tmp_path, "hang") as hanging:
        pass
    assert not psutil.pid_exists(hanging.pid)


BROKEN = "import os, sys; sys.stderr.write('one\\nlast words\\n'); {}"


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("sys.exit(7)", "the process ended with status 7; its last words: last words"),
        ("os.close(1); import time; time.sleep(60)", "the process closed its output"),
    ],
)
def test_another_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, told: str
) -> None:
    """Whatever else ends the answers is told."""
    monkeypatch.setattr(_process, "_GRACE", 0.2 if "sleep" in ending else LIMIT)
    program = [sys.executable, "-c", BROKEN.format(ending)]
    monkeypatch.setattr(_process, "_COMMAND", program)
    with child(tmp_path, "predict") as broken, pytest.raises(ChildError) as caught:
        broken.ask()
    assert str(caught.value) == told


PARENT = """
import sys
from asgi_infer.doctor._process import Child
target = dict(model="tests.doctor.models:Model", call="hang", sample="tests.doctor.models:row",
              app_dir=sys.argv[1])
with Child(dict(role="preflight", target=target, sample=sys.argv[2]), patience=60) as child:
    print(child.pid, flush=True)
    child.ask()
"""


def test_a_parent_that_is_killed(tmp_path: Path) -> None:
    """A child in the middle of a call ends with its parent, even where that can do nothing."""
    command = [sys.executable, "-c", PARENT, ROOT, str(tmp_path / "sample.pickle")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until_true((tmp_path / "sample.pickle").exists)  # it is past its start
        parent.kill()
    until_true(lambda: gone(pid))


def gone(pid: int) -> bool:
    """Whether it has ended, be it that nobody has fetched its status."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
