"""What the process worker adds to what all remote workers have in common."""

from __future__ import annotations

import os
import sys
import threading

import anyio
import pytest

from asgi_infer import InferenceRunner, NativePolicy
from asgi_infer.native import cpu
from asgi_infer.workers import ProcessWorker
from asgi_infer.workers import process as module
from asgi_infer.workers._protocol import ModelSpec
from asgi_infer.workers.process import ProcessLink, share

from .functions import Model, echo

CPUS = cpu.IMPORT_AFFINITY


def make_spec(load: object = Model) -> ModelSpec:
    return ModelSpec(name="test", load=load, warmup=None, native=NativePolicy())  # type: ignore[arg-type]


def test_one_replica_has_everything() -> None:
    """One alone runs under what it was given, untouched."""
    native = NativePolicy(threads=3)
    assert share(native, 0, 1) is native


def test_shares() -> None:
    """Several have CPUs of their own, and no more threads in all than one would have."""
    shares = [share(NativePolicy(cpus=range(4)), number, 2) for number in range(2)]
    assert [sorted(each.cpus or ()) for each in shares] == [[0, 1], [2, 3]]
    assert all(each.threads for each in shares)
    in_all = NativePolicy(cpus=range(4)).thread_count
    assert sum(each.threads or 0 for each in shares) <= max(2, in_all)


def test_given_threads_stay() -> None:
    """A number of threads that is given is each replica's."""
    assert share(NativePolicy(threads=5), 1, 2).threads == 5


def where() -> tuple[int, frozenset[int]]:
    """The process, and the CPUs that it may use."""
    return os.getpid(), frozenset(os.sched_getaffinity(0))


@pytest.mark.skipif(len(CPUS) < 2, reason="one CPU can't be shared out")
@pytest.mark.skipif(sys.platform != "linux", reason="affinity is set on Linux only")
def test_replicas_side_by_side() -> None:
    """Two replicas are two processes on different CPUs, and run two calls at once."""
    with InferenceRunner[None](worker=ProcessWorker(2)) as runner:
        anyio.run(runner.start)
        found: set[tuple[int, frozenset[int]]] = set()
        while len(found) < 2:
            futures = [runner.submit(where) for _ in range(4)]
            found |= {future.result() for future in futures}
    (one, mine), (other, others) = found
    assert one != other
    assert not mine & others


@pytest.mark.parametrize("replicas", [0, -1, 1.5])
def test_replicas_that_make_no_sense(replicas: int) -> None:
    """There is one at least."""
    with pytest.raises(ValueError, match="replicas"):
        ProcessWorker(replicas)


def test_what_can_not_be_sent() -> None:
    """Of a process that can't be told what to load, nothing is left."""
    replica = ProcessWorker().replica(make_spec(lambda: 1), 0)
    with pytest.raises(TypeError, match=r"load=.*<lambda> of 'test' can't be sent"):
        replica.open(lambda: None)
    assert replica.lost
    replica.close()


def test_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none can be started, the error says so, and nothing is left."""

    def fail(**_: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(module, "Child", fail)
    with pytest.raises(OSError, match="no more processes"):
        ProcessLink(make_spec())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_fork() -> None:
    """A forked child starts a process of its own, and the parent's goes on serving the parent."""
    with InferenceRunner[None](worker=ProcessWorker()) as runner:
        before = runner.submit(os.getpid).result()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:  # pragma: no cover  # in the child
            status = 1
            try:
                in_child = runner.submit(os.getpid).result(10)
                os.write(writer, str(in_child).encode())
                runner.shutdown()
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        in_child = int(os.read(reader, 100) or b"0")
        os.close(reader)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert in_child not in (before, 0)
        assert runner.submit(os.getpid).result() == before
        assert runner.submit(echo, threading.TIMEOUT_MAX).result() == threading.TIMEOUT_MAX


def test_left_behind() -> None:
    """What a forked child lets go of is its copy of the channel, not the parent's process."""
    link = ProcessLink(make_spec())
    link.leave_behind()
    assert link.channel.fileno() == -1
    assert link.attend()
    link.close()
