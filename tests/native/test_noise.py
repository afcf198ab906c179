"""How quiet the machine is: whose CPU time counts as noise, and whose waiting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from asgi_infer.native import noise
from asgi_infer.native.noise import Noise, NoiseMeter, quiet_moment, stalled

HOUR = 3600.0


def machine(path: Path, *, elsewhere: int = 0, **ours: int) -> None:
    """Write what Linux says of the machine; the idle and interrupt fields are never nothing.

    :param elsewhere: on a CPU that is not ours
    :param ours: ``user``, ``nice``, ``system`` and ``steal``, on two that are
    """
    user, nice, system, steal = (
        ours.get(name, 0) // 2 for name in ("user", "nice", "system", "steal")
    )
    half = f"{user} {nice} {system} 99999 88888 77777 66666 {steal} 0 0"
    other = f"{elsewhere} 1 1 1 1 1 1 {elsewhere} 1 1"
    path.write_text(f"cpu  {other}\ncpu0 {half}\ncpu1 {other}\ncpu2 {half}\nintr 5\n\n")


@pytest.fixture
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that is read as the machine's CPU time, in hundredths of a second."""
    path = tmp_path / "stat"
    machine(path)
    monkeypatch.setattr(noise, "_STAT", path)
    monkeypatch.setattr(noise, "_TICKS", 100)
    monkeypatch.setattr(noise, "_CPUS", ("cpu0", "cpu2"))
    return path


@pytest.mark.parametrize(
    ("pressure", "others", "stolen", "busy"),
    [
        (0.0, 0.0, 0.0, False),
        (0.05, 0.1, 0.1, False),
        (0.06, 0.0, 0.0, True),
        (0.0, 0.11, 0.0, True),
        (0.0, 0.0, 0.11, True),
    ],
)
def test_busy(pressure: float, others: float, stolen: float, busy: bool) -> None:
    """Each of the three is enough, above its bound."""
    assert Noise(pressure=pressure, others=others, stolen=stolen).busy is busy


@pytest.mark.parametrize(("own", "noisy"), [(0.0, True), (3 * HOUR, False), (4 * HOUR, False)])
def test_others_are_all_but_this_process_and_its_children(
    own: float, noisy: bool, stat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the CPU time of the machine, what is ours is no noise; less than none is none."""
    mine = iter([0.0, own])
    monkeypatch.setattr(noise, "_own_cpu", lambda: next(mine))
    meter = NoiseMeter()
    machine(stat, user=360_000, nice=360_000, system=360_000)
    read = meter.read()
    assert (read.others > 0, read.busy) == (noisy, noisy)
    assert (read.stolen, read.pressure) == (0.0, 0.0)


def test_stolen_time_is_noise_of_its_own(stat: Path) -> None:
    """What the host takes away is not counted among the others."""
    meter = NoiseMeter(pressure=0.03)
    machine(stat, steal=360_000)
    read = meter.read()
    assert (read.others, read.pressure) == (0.0, 0.03)
    assert read.stolen > 0.1


def test_other_cpus_are_no_matter_of_ours(stat: Path) -> None:
    """What is done on CPUs that this process may not use does not disturb it."""
    meter = NoiseMeter()
    machine(stat, elsewhere=360_000)
    read = meter.read()
    assert (read.others, read.stolen) == (0.0, 0.0)


def test_cpus_under_other_numbers(stat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none of ours is listed, all count."""
    monkeypatch.setattr(noise, "_CPUS", ("cpu7",))
    meter = NoiseMeter()
    machine(stat, elsewhere=360_000)
    assert meter.read().busy


def test_a_child_counts_as_ours_once_it_has_been_waited_for() -> None:
    """The CPU time of a child is no noise."""
    own = noise._own_cpu()
    spin = "import time\nwhile time.process_time() < 0.1: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    assert noise._own_cpu() - own > 0.09


def test_pressure_is_the_share_of_a_quiet_moment_in_which_somebody_waited(
    stat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the moment spent waiting for a CPU is a pressure of one half."""
    waited = iter([1.0, 1.01])
    monkeypatch.setattr(noise, "stalled", lambda: next(waited))
    moment = quiet_moment(0.02)
    assert moment.pressure == pytest.approx(0.5)
    assert (moment.others, moment.stolen) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("some avg10=0.36 avg60=2.68 total=13768334\nfull avg10=0.00 total=17\n", 13.768334),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_stalled(
    text: str | None, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's count since it started, of some task waiting; nothing where it keeps none."""
    path = tmp_path / "cpu"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(noise, "_PRESSURE", path)
    assert stalled() == seconds


def test_no_noise_is_seen_off_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody tells, a machine is taken to be quiet."""
    monkeypatch.setattr(noise, "_STAT", tmp_path / "missing")
    monkeypatch.setattr(noise, "_PRESSURE", tmp_path / "missing")
    assert quiet_moment(0.0001) == Noise(pressure=0.0, others=0.0, stolen=0.0)
