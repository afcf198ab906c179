"""How many CPUs there really are, on recorded trees of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asgi_infer.native import cpu
from asgi_infer.native.cpu import IMPORT_AFFINITY, cgroup_quota, recommended_threads


class Tree:
    """A file system root with what the kernel would show there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def member_of(self, text: str | bytes) -> None:
        """``/proc/self/cgroup``."""
        self._write(self.root / "proc/self/cgroup", text)

    def v2(self, group: str, text: str | bytes) -> None:
        self._write(self.root / "sys/fs/cgroup" / group / "cpu.max", text)

    def v1(self, group: str, quota: str, period: str = "100000") -> None:
        directory = self.root / "sys/fs/cgroup" / group
        self._write(directory / "cpu.cfs_quota_us", quota)
        self._write(directory / "cpu.cfs_period_us", period)

    @staticmethod
    def _write(path: Path, text: str | bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# -- version 2 ---------------------------------------------------------------------------------


def test_v2(tree: Tree) -> None:
    """The quota is the time allowed in each period."""
    tree.member_of("0::/kubepods/pod7\n")
    tree.v2("kubepods/pod7", "150000 100000\n")
    assert cgroup_quota(tree.root) == 1.5


def test_v2_root_of_a_container(tree: Tree) -> None:
    """Inside a container the own group is the root."""
    tree.member_of("0::/\n")
    tree.v2("", "200000 100000\n")
    assert cgroup_quota(tree.root) == 2.0


@pytest.mark.parametrize("tightest", ["", "a", "a/b", "a/b/c"])
def test_v2_least_of_all_ancestors(tree: Tree, tightest: str) -> None:
    """Any ancestor may be the one that limits."""
    tree.member_of("0::/a/b/c\n")
    for group in ("", "a", "a/b", "a/b/c"):
        tree.v2(group, "100000 100000\n" if group == tightest else "400000 100000\n")
    assert cgroup_quota(tree.root) == 1.0


def test_v2_no_limit(tree: Tree) -> None:
    """``max`` is no limit, whatever the period."""
    tree.member_of("0::/a\n")
    tree.v2("a", "max 100000\n")
    assert cgroup_quota(tree.root) is None


def test_v2_limit_above_no_limit(tree: Tree) -> None:
    """A group without a limit is still held by the one above it."""
    tree.member_of("0::/a/b\n")
    tree.v2("a/b", "max 100000\n")
    tree.v2("a", "300000 100000\n")
    assert cgroup_quota(tree.root) == 3.0


def test_not_the_neighbours(tree: Tree) -> None:
    """Limits of groups beside the own one don't count."""
    tree.member_of("0::/a/b\n")
    tree.v2("a/other", "100000 100000\n")
    assert cgroup_quota(tree.root) is None


# -- version 1 ---------------------------------------------------------------------------------


def test_v1(tree: Tree) -> None:
    """Version 1 has two files, in a tree named for its controllers; the order varies."""
    tree.member_of("9:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n")
    tree.v1("cpu,cpuacct/docker/x", "250000\n", "100000\n")
    assert cgroup_quota(tree.root) == 2.5


def test_v1_least_of_all_ancestors(tree: Tree) -> None:
    """Ancestors count in version 1 as well."""
    tree.member_of("3:cpu:/docker/x\n")
    tree.v1("cpu/docker/x", "400000")
    tree.v1("cpu/docker", "50000")
    tree.v1("cpu", "-1")
    assert cgroup_quota(tree.root) == 0.5


def test_v1_no_limit(tree: Tree) -> None:
    """-1 is version 1's word for no limit."""
    tree.member_of("3:cpu:/docker/x\n")
    tree.v1("cpu/docker/x", "-1\n")
    assert cgroup_quota(tree.root) is None


def test_v1_other_controllers(tree: Tree) -> None:
    """Files under other controllers, or under one whose name merely has cpu in it, don't count."""
    tree.member_of("5:memory:/x\n6:cpuset:/x\n")
    tree.v1("memory/x", "100000")
    tree.v1("cpuset/x", "100000")
    assert cgroup_quota(tree.root) is None


def test_hybrid(tree: Tree) -> None:
    """With both versions mounted the tighter limit counts."""
    tree.member_of("4:cpu,cpuacct:/x\n0::/y\n")
    tree.v1("cpu,cpuacct/x", "300000")
    tree.v2("y", "100000 50000")
    assert cgroup_quota(tree.root) == 2.0


# -- what makes no sense -----------------------------------------------------------------------


def test_nothing_there(tree: Tree) -> None:
    """Without control groups, or off Linux, there is no quota."""
    assert cgroup_quota(tree.root) is None
    tree.member_of("0::/gone\n")
    assert cgroup_quota(tree.root) is None


@pytest.mark.parametrize(
    "text", ["", "\n", "nonsense", "1:2", "::::", b"\xff\xfe\x00", "0::/../.."]
)
def test_garbage_membership(tree: Tree, text: str | bytes) -> None:
    """Whatever /proc/self/cgroup says, the answer is no quota, not an error."""
    tree.member_of(text)
    assert cgroup_quota(tree.root) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "max", "100000", "1 2 3", "abc def", "100000 max", "100000 0", "0 100000"),
        *("-100000 100000", "1e5 1e5", "9" * 400 + " 1", "9" * 5000 + " 1", b"\xff\xfe \x00"),
    ],
    ids=lambda text: repr(text)[:20],
)
def test_garbage_limit(tree: Tree, text: str | bytes) -> None:
    """A limit that makes no sense is none."""
    tree.member_of("0::/a\n")
    tree.v2("a", text)
    assert cgroup_quota(tree.root) is None


def test_v1_half(tree: Tree) -> None:
    """A quota without its period is none."""
    tree.member_of("3:cpu:/x\n")
    tree.v1("cpu/x", "100000")
    (tree.root / "sys/fs/cgroup/cpu/x/cpu.cfs_period_us").unlink()
    assert cgroup_quota(tree.root) is None


def test_name_that_is_no_text(tree: Tree) -> None:
    """A group's name is any bytes; its limit counts all the same."""
    tree.member_of(b"0::/caf\xe9\n")
    directory = os.fsencode(tree.root) + b"/sys/fs/cgroup/caf\xe9"
    os.makedirs(directory)
    Path(os.fsdecode(directory), "cpu.max").write_text("100000 100000")
    assert cgroup_quota(tree.root) == 1.0


# -- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "quota", "threads"),
    [
        (8, None, 8),
        (8, 4.0, 4),
        (8, 3.99, 3),
        (2, 16.0, 2),
        (8, 0.5, 1),
        (1, None, 1),
    ],
)
def test_recommended_threads(
    monkeypatch: pytest.MonkeyPatch, cpus: int, quota: float | None, threads: int
) -> None:
    """The affinity mask or the quota, whichever is less; rounded down, and never 0."""
    monkeypatch.setattr(cpu, "cgroup_quota", lambda: quota)
    assert recommended_threads(frozenset(range(cpus))) == threads


def test_recommended_threads_here() -> None:
    """By default it looks at this machine."""
    assert 1 <= recommended_threads() <= len(IMPORT_AFFINITY)


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_affinity_is_that_of_the_import() -> None:
    """What the mask was when the package was imported is kept, whatever happens to it later."""
    script = (
        "import os; mine = min(os.sched_getaffinity(0)); os.sched_setaffinity(0, {mine})\n"
        "from asgi_infer.native.cpu import IMPORT_AFFINITY; assert IMPORT_AFFINITY == {mine}"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
