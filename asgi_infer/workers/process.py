"""The model lives in a process of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from .._checks import check_count
from .._model import ModelReference
from ..native import NativePolicy, cpu
from ._channel import Channel, Kind
from ._child import Child
from ._page import ControlPage, make_page_file
from ._protocol import ModelSpec
from ._remote import RemoteReplica, RemoteWorker, encode_spec, reduce_reference


@dataclass(frozen=True)
class ProcessWorker(RemoteWorker):
    """Keep the model in a process of its own, on that process's main thread.

    The right place for a binding that holds the GIL while it computes, and for native code that
    may crash: the event loop runs on, and a process that dies takes one call with it. It is
    started again, and the calls that were waiting run then.

    What a call takes and returns is pickled, so functions are to be importable; NumPy arrays go
    through shared memory, and are not copied where they arrive.

    :param replicas: how many processes, each with a model and CPUs of its own
    :param hard_timeout: seconds after which a call, or a step of a stream, that still runs is
        killed, and its process with it
    :param startup_timeout: seconds that loading and warming up may take
    :param retry_crashed: run a call again, once, whose process has died. Only for calls that may
        run twice
    :param restart: what is done about a process that dies
    :raises ValueError: a number makes no sense
    """

    replicas: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("replicas", self.replicas)

    def replica(self, spec: ModelSpec, number: int, /) -> ProcessReplica:
        """One of the processes, which is not started yet."""
        return ProcessReplica(spec, self, native=share(spec.native, number, self.replicas))


class ProcessReplica(RemoteReplica):
    """A model in a child process."""

    def __init__(self, spec: ModelSpec, worker: ProcessWorker, *, native: NativePolicy) -> None:
        super().__init__(spec, worker)
        self._native = native

    def _connect(self) -> ProcessLink:
        link = ProcessLink(self._spec)
        try:
            opening = encode_spec(link.channel, replace(self._spec, native=self._native))
            link.channel.send(Kind.OPEN, opening)
        except BaseException:
            link.close()
            raise
        return link


class ProcessLink:
    """A child process, and the channel to it.

    :param spec: what references to the model carry as their owner
    :raises OSError: it could not be started
    """

    def __init__(self, spec: ModelSpec) -> None:
        with ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.callback(theirs.close)
            page_fd = make_page_file()
            stack.callback(os.close, page_fd)
            self.page = ControlPage(page_fd)
            self.channel = Channel(ours, dispatch={ModelReference: reduce_reference(spec)})
            with ExitStack() as until_started:
                until_started.callback(self.channel.close)
                self._child = Child(name=spec.name, fds=(theirs.fileno(), page_fd))
                until_started.pop_all()

    @property
    def watched(self) -> Sequence[int]:
        """Its death, and what it writes."""
        return (self._child.sentinel, *self._child.log_fds)

    def attend(self) -> bool:
        """Log what it has written; False if it has ended."""
        self._child.pump()
        return not self._child.ended

    def dump(self) -> None:
        """Have it write its stacks to the log."""
        self._child.dump()

    def kill(self) -> None:
        """End it."""
        self._child.kill()

    def died(self) -> str:
        """How it has ended."""
        return self._child.died()

    @property
    def last_words(self) -> str:
        """The last lines that it has written to stderr."""
        return self._child.last_words

    def close(self) -> None:
        """End it, if it still runs."""
        self.channel.close()
        self._child.close()

    def leave_behind(self) -> None:
        """In a forked child: close the channel, whose end the process is to notice."""
        self.channel.close()


def share(native: NativePolicy, number: int, replicas: int) -> NativePolicy:
    """The part of the CPUs and of the threads that one of several replicas gets.

    Without a number of threads that is given, all together have no more than one would have.
    """
    if replicas == 1:
        return native
    cpus = frozenset(native.cpus or cpu.IMPORT_AFFINITY)
    threads = native.threads or max(1, native.thread_count // replicas)
    return replace(native, cpus=cpu.split(cpus, replicas)[number], threads=threads)
