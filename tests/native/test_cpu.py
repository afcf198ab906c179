"""How many CPUs there really are, on recorded trees of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asgi_infer.native import cpu
from asgi_infer.native.cpu import (
    IMPORT_AFFINITY,
    Throttling,
    budget,
    cgroup_quota,
    recommended_threads,
    split,
    throttling,
)


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

    def statistics(self, group: str, text: str | bytes) -> None:
        """``cpu.stat`` of a group."""
        self._write(self.root / "sys/fs/cgroup" / group / "cpu.stat", text)

    def siblings(self, cpu: int, text: str) -> None:
        """The CPUs that share a core with one."""
        topology = self.root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        self._write(topology / "thread_siblings_list", text)

    def capacity(self, cpu: int, text: str) -> None:
        """How fast ARM says that a CPU is."""
        self._write(self.root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", text)

    def kind(self, name: str, cpus: str) -> None:
        """The CPUs of one of Intel's kinds."""
        self._write(self.root / f"sys/devices/cpu_{name}/cpus", cpus)

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


def test_v1_mounted_under_another_name(tree: Tree) -> None:
    """Where the directory has the controllers in another order, there is a link named cpu."""
    tree.member_of("4:cpuacct,cpu:/docker/x\n")
    tree.v1("cpu/docker/x", "250000\n", "100000\n")
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


# -- throttling --------------------------------------------------------------------------------


def test_throttling_v2(tree: Tree) -> None:
    """Of the group and all above it, the one that was throttled most counts."""
    tree.member_of("0::/a/b\n")
    counts = "usage_usec 1\nnr_periods {}\nnr_throttled {}\nthrottled_usec {}\n"
    tree.statistics("a/b", counts.format(10, 3, 2_500_000))
    tree.statistics("a", counts.format(20, 1, 500_000))
    tree.statistics("", "usage_usec 12345\n")
    assert throttling(tree.root) == Throttling(
        periods=10, throttled_periods=3, throttled_seconds=2.5
    )


def test_throttling_v1(tree: Tree) -> None:
    """Version 1 counts nanoseconds."""
    tree.member_of("3:cpu,cpuacct:/docker/x\n")
    counts = "nr_periods 100\nnr_throttled 40\nthrottled_time 1500000000\n"
    tree.statistics("cpu,cpuacct/docker/x", counts)
    assert throttling(tree.root) == Throttling(
        periods=100, throttled_periods=40, throttled_seconds=1.5
    )


@pytest.mark.parametrize("text", ["", "nr_throttled\n", "nr_throttled many\n", b"\xff\xfe\x00"])
def test_throttling_garbage(tree: Tree, text: str | bytes) -> None:
    """What makes no sense, or isn't there, counts as nothing."""
    nothing = Throttling(periods=0, throttled_periods=0, throttled_seconds=0.0)
    assert throttling(tree.root) == nothing
    tree.member_of("0::/a\n")
    tree.statistics("a", text)
    assert throttling(tree.root) == nothing


# -- processors --------------------------------------------------------------------------------


def test_smt(tree: Tree) -> None:
    """CPUs that share a core count as one core; only those that may be used count."""
    for cpu_number in range(4):
        tree.siblings(cpu_number, f"{cpu_number % 2},{cpu_number % 2 + 2}\n")
    four = budget(frozenset(range(4)), tree.root)
    assert (four.cores, four.smt, four.threads) == (2, True, 4)
    assert four.reason == ("4 CPUs may be used, on 2 cores; one thread for each core may do more")
    two = budget(frozenset({0, 1}), tree.root)
    assert (two.cores, two.smt, two.threads) == (2, False, 2)
    assert two.reason == "2 CPUs may be used"


def test_split_of_cores(tree: Tree) -> None:
    """Each part has whole cores, which are neighbours, whatever the CPUs' numbers."""
    for number in range(8):
        tree.siblings(number, f"{number % 4},{number % 4 + 4}\n")
    parts = split(frozenset(range(8)), 2, tree.root)
    assert parts == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert split(frozenset({0, 1, 2, 4}), 2, tree.root) == [{0, 4}, {1, 2}]


def test_split_finer_than_cores(tree: Tree) -> None:
    """With more parts than cores no two share a CPU; with more than CPUs, some have to."""
    for number in range(4):
        tree.siblings(number, f"{number % 2},{number % 2 + 2}\n")
    assert split(frozenset(range(4)), 3, tree.root) == [{0}, {1}, {2, 3}]
    assert split(frozenset({0, 3}), 3, tree.root) == [{0}, {3}, {0}]


def test_split_of_one() -> None:
    """One part is all of it."""
    assert split(frozenset({1, 2}), 1) == [{1, 2}]


def test_unknown_topology(tree: Tree) -> None:
    """Where the system doesn't tell, each CPU is a core, and all are of one kind."""
    found = budget(frozenset(range(3)), tree.root)
    assert (found.cores, found.smt, found.hybrid) == (3, False, False)


@pytest.mark.parametrize(
    ("core", "atom", "hybrid"),
    [
        *(("0-3", "4-7", True), ("0-3\n", "6,7\n", True), ("0,1", "2", True)),
        *(("0-7", "8-15", False), ("0-3", "", False), ("x-y", "4-7", False)),
    ],
)
def test_hybrid_intel(tree: Tree, core: str, atom: str, hybrid: bool) -> None:
    """Fast and slow cores make a hybrid only if both may be used."""
    tree.kind("core", core)
    tree.kind("atom", atom)
    found = budget(frozenset(range(8)), tree.root)
    assert found.hybrid is hybrid
    assert ("fast and slow" in found.reason) is hybrid


def test_hybrid_arm(tree: Tree) -> None:
    """On ARM it is the CPUs' capacities that differ; a CPU without one says nothing."""
    tree.capacity(0, "1024\n")
    tree.capacity(1, "1024\n")
    assert not budget(frozenset({0, 1, 2}), tree.root).hybrid
    tree.capacity(2, "446\n")
    assert budget(frozenset({0, 1, 2}), tree.root).hybrid


def test_budget_with_a_quota(tree: Tree) -> None:
    """A quota that pays for less than the CPUs decides, and is the reason given."""
    tree.member_of("0::/\n")
    tree.v2("", "250000 100000\n")
    found = budget(frozenset(range(8)), tree.root)
    assert (found.quota, found.threads) == (2.5, 2)
    assert found.reason.startswith("the cgroup's quota pays for 2.5 of 8 CPUs; ")


def test_budget_here() -> None:
    """The number is the one that runners use by default."""
    found = budget()
    assert found.threads == recommended_threads()
    assert 1 <= found.cores <= len(found.cpus)
    assert budget(frozenset({min(found.cpus)})).reason.startswith("1 CPU may be used")


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
