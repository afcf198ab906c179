"""A server of one arm while a ``with`` block lasts: a process of its own, as everywhere."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from asgi_infer.native.procfs import all_thread_counters

from ._children import Child
from ._figure import Sample, Scale, Unavailable
from ._flow_server import application
from ._server import configured, listener
from ._usage import Reading


@dataclass(frozen=True)
class Running:
    """A server that is up."""

    port: int
    read: Callable[[], Reading]
    """Reads the counters of its threads."""
    loop: int
    """The native thread of its event loop."""


def only_told_otherwise(measure: Callable[[Scale], Sample]) -> Callable[[Scale], Sample]:
    """An arm that runs the same code as another: whether that runs is seen there."""

    def step(scale: Scale) -> Sample:
        if not scale.iterations:
            raise Unavailable("with a no-op it differs from its neighbour in nothing")
        return measure(scale)

    return step


@contextmanager
def server(scale: Scale, *arguments: str) -> Iterator[Running]:
    """The server with these arguments of ``benchmarks._flow_server``.

    Where there is a no-op in the place of every model, only whether everything runs is of
    interest, and a thread in the place of the process starts twenty times as fast.
    """
    if not scale.iterations:
        with _in_a_thread(*arguments) as port:
            pid = os.getpid()
            yield Running(port, lambda: all_thread_counters(pid), pid)
        return
    with Child("_flow_server", *arguments) as child:
        port = child.ask()["port"]
        yield Running(port, lambda: all_thread_counters(child.pid), child.pid)
        child.kill()  # after an overload some arms have a minute of calls left that nobody awaits


@contextmanager
def _in_a_thread(*arguments: str) -> Iterator[int]:
    with listener() as listening:
        listening.listen()  # whoever comes before the server is up waits for it
        running = uvicorn.Server(configured(application(arguments)))
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()
