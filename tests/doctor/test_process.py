"""Facts about child processes: how their ends are told, and that none outlives its block."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
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


BROKEN = "import os, sys; sys.stderr.write('one\\nthe end\\n'); {}"


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("sys.exit(7)", "the process ended with status 7; its last words: the end"),
        ("os.close(1); import time; time.sleep(60)", "the process closed its output"),
        (
            "os.kill(os.getpid(), 9)",
            "the process was killed by SIGKILL, perhaps out of memory; its last words: the end",
        ),
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


def test_only_the_end_of_what_it_wrote_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much a child writes, its last words are among the last bytes."""
    monkeypatch.setattr(_process, "_TAIL", 4)
    monkeypatch.setattr(_process, "_COMMAND", [sys.executable, "-c", BROKEN.format("")])
    with child(tmp_path, "predict") as broken, pytest.raises(ChildError, match=r"words: end$"):
        broken.ask()


FORKS = """
import os, sys, time
forked = os.fork()
if not forked:
    time.sleep(60)
sys.stderr.write(str(forked))
sys.stderr.flush()
os._exit(7)
"""


def test_a_crash_while_what_it_forked_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is noticed though the channel stays open, and what was forked is ended too."""
    monkeypatch.setattr(_process, "_COMMAND", [sys.executable, "-c", FORKS])
    with child(tmp_path, "predict") as forking, pytest.raises(ChildError) as caught:
        forking.ask(every=0.01)
    told = re.fullmatch(
        r"the process ended with status 7; its last words: (\d+)", str(caught.value)
    )
    assert told is not None
    until_true(lambda: gone(int(told[1])))


def test_an_answer_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said in time is not lost by looking whether the child is still there."""
    program = [sys.executable, "-c", "print('{\"said\": 1}')"]
    monkeypatch.setattr(_process, "_COMMAND", program)
    with child(tmp_path, "predict") as brief:
        until_true(brief._has_ended)
        brief.check()
        assert brief.ask() == {"said": 1}
        with pytest.raises(ChildError, match="the process ended with status 0"):
            brief.check()


def test_an_interrupt_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that has just been started is ended as well."""

    def interrupted(self: Child, **values: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "tell", interrupted)
    starting = child(tmp_path, "hang")
    with pytest.raises(KeyboardInterrupt), starting:
        pass
    assert not psutil.pid_exists(starting.pid)


def test_time_that_has_passed_is_not_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a stall the next interval ends when it would have, and those missed are left out."""
    now, ticks = [0.0], []

    def nothing_for(seconds: float) -> bool:
        now[0] += max(0.0, seconds)
        return False

    def tick() -> None:
        ticks.append(now[0])
        now[0] += 0.5 if len(ticks) == 1 else 0.0

    waiting = Child({}, patience=1.0)
    monkeypatch.setattr(_process, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(waiting, "_readable", nothing_for)
    monkeypatch.setattr(waiting, "check", lambda: None)
    with pytest.raises(ChildError, match="hung"):
        waiting.ask(every=0.125, meanwhile=tick)
    assert ticks == [0.125, 0.75, 0.875]


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
