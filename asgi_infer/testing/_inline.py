"""A runner without a thread: calls run where they are made, on a clock that stands still.

Everything but the thread is the real thing: admission, the queue and the books are the real
scheduler's, and functions are run by the code that the inference thread runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

from .._call import Caller
from .._runner import InferenceRunner
from .._statistics import RunnerStatistics
from .._thread import InferenceThread
from ._clock import VirtualClock
from ._faults import Fault, Faults
from ._inline_thread import InlineScheduler, InlineThread

ModelT = TypeVar("ModelT")


class InlineRunner(InferenceRunner[ModelT], Faults):
    """An ``InferenceRunner`` for unit tests: calls run at once, on the thread that makes them.

    ::

        runner = InlineRunner(Model)
        assert await runner.run(runner.model.predict, image) == 7
        assert runner.submit(runner.model.predict, image).result() == 7

    The whole public face works: so do ``Batcher``, ``InferenceMiddleware``, ``RunnerDep`` and
    ``TestClient``. What differs:

    * Nothing ever waits in line, so that batches are of one item.
    * Time passes when the test says so: ``runner.clock.advance(...)``, or ``slow``.
    * An item of a stream is made when the one before it is taken; other calls run in between.
    * Nothing is set for the thread but ``NativePolicy.contexts``, and the worker is not used.
    * It need not be stopped.

    :param load: as of ``InferenceRunner``
    :param clock: what deadlines are on; one of its own by default
    :param options: as of ``InferenceRunner``
    """

    _thread_type = InlineThread
    _scheduler_type = InlineScheduler
    _stand_in: Callable[[], object] | None = None  # makes what is used instead of the model

    def __init__(
        self,
        load: Callable[[], ModelT] | None = None,
        *,
        clock: VirtualClock | None = None,
        **options: Any,
    ) -> None:
        super().__init__(load, **options)
        self._run_on(VirtualClock() if clock is None else clock)

    def statistics(self) -> RunnerStatistics:
        """As of any runner; in ``draining`` and ``not_ready`` blocks the state is theirs."""
        statistics = super().statistics()
        return replace(statistics, state=self._fault.state or statistics.state)

    def _run_on(self, clock: VirtualClock) -> None:
        self.clock = self._clock = clock
        self._fault = Fault()

    def _make_thread(self, previous: InferenceThread | None) -> InferenceThread:
        thread = cast("InlineThread", super()._make_thread(previous))
        thread.prepare(self._fault, self._stand_in or self._spec.load)
        return thread

    def _deadline(self, timeout: float | None, caller: Caller | None) -> float | None:
        deadline = super()._deadline(timeout, None)
        if caller is None or caller.deadline is None:
            return deadline
        # A client's deadline is on the other clock: what counts is how much time it has left.
        theirs = self.clock() + caller.deadline - time.monotonic()
        return theirs if deadline is None else min(theirs, deadline)

    def __del__(self) -> None:
        # No warning, unlike a runner with a thread that would go on. Only the model has to go.
        thread: InferenceThread | None = getattr(self, "_thread", None)
        if thread is not None:
            thread.stop_soon()


@contextmanager
def run_inline(
    runner: InferenceRunner[ModelT],
    load: Callable[[], object] | None = None,
    *,
    clock: VirtualClock | None = None,
) -> Iterator[InlineRunner[ModelT]]:
    """Within the block ``runner`` is an ``InlineRunner``: for one that is a global of a module.

    ::

        with run_inline(app_module.runner, FakeModel) as runner, runner.full():
            assert client.post("/predict", ...).status_code == 503

    It stays the same object, so that whoever holds it, a ``Batcher`` or a reference to its model
    included, need not know. Its books start from nothing. After the block it is as it was, and
    what it ran then is untouched; no call of it may be under way at either end.

    :param load: makes what stands in for the model; it isn't warmed up. By default the model
        itself is loaded
    :param clock: as of ``InlineRunner``
    """
    kind, before = type(runner), dict(vars(runner))
    inline = _become_inline(runner)
    inline._begin()  # noqa: SLF001
    inline._stand_in = load  # noqa: SLF001
    inline._run_on(VirtualClock() if clock is None else clock)  # noqa: SLF001
    try:
        yield inline
    finally:
        if inline._thread is not None:  # noqa: SLF001
            inline._thread.stop_now()  # noqa: SLF001
        vars(runner).clear()
        vars(runner).update(before)
        runner.__class__ = kind


def _become_inline(runner: InferenceRunner[ModelT]) -> InlineRunner[ModelT]:
    # Its class is what is exchanged: everybody knows the object, and nobody asks for its class.
    kind = type(runner)
    inline: Any = kind if issubclass(kind, InlineRunner) else InlineRunner
    if kind not in (InferenceRunner, inline):
        inline = type(kind.__name__, (InlineRunner, kind), {})
    runner.__class__ = inline
    return cast("InlineRunner[ModelT]", runner)


class Inline(Protocol):
    """What the pytest fixture ``inline`` is: ``run_inline`` for as long as the test lasts."""

    def __call__(
        self,
        runner: InferenceRunner[Any],
        load: Callable[[], object] | None = None,
        *,
        clock: VirtualClock | None = None,
    ) -> InlineRunner[Any]:
        """Make ``runner`` inline until the test ends; return it. See ``run_inline``."""
        ...
