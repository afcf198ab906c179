"""Concurrent calls become one: for models that take many items in little more time than one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from . import _checks, _stacking
from ._batch import BatchFunction
from ._runner import InferenceRunner

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Batcher(Generic[ItemT, ResultT]):
    """Gathers concurrent calls, and has them run together by a function that takes a list.

    ::

        embed = Batcher(runner, runner.model.embed, max_size=64)   # embed(texts) -> vectors

        vector = await embed.run("a text")

    There is no waiting window: what has queued while the model was busy is the next batch, and
    a call that finds it idle runs at once. Each item is a call of its own, in the runner's
    queue, its books and its bounds: it has its own time limit and priority, and whoever is
    cancelled or hangs up leaves the others alone.

    A batch that fails is run again in halves until the item that makes it fail is alone, and it
    alone gets the error. So the function is to have no effects that must not be repeated.

    :param runner: runs the batches
    :param func: takes a list of items, also of a single one, and returns as many results in the
        same order: a list, a tuple, or an array with as many rows. It runs in the context in
        which the ``Batcher`` was made
    :param max_size: of a batch. Where callers have time limits, a batch is no larger than what
        can be done in time, as far as is known from the batches before
    :param max_delay: seconds that the model may stand idle so that a batch grows. It does only
        while calls come so fast that all are answered sooner for it, and nothing else waits
    :param stack: the items are NumPy arrays, or tuples or dicts of arrays, and ``func`` gets one
        array (or a tuple or dict) with one axis more, the first. Only items of equal shapes and
        dtypes share a batch. Arrays that it returns are taken apart as views: the one copy is
        that of the items
    :raises TypeError: ``func`` is async or a generator function, or no function
    :raises ValueError: a number makes no sense
    """

    def __init__(
        self,
        runner: InferenceRunner[Any],
        func: Callable[[list[ItemT]], Sequence[ResultT]],
        *,
        max_size: int,
        max_delay: float = 0.0,
        stack: bool = False,
    ) -> None:
        _checks.check_func(func)
        self._runner = runner
        self._function = BatchFunction(
            func,
            max_size=_checks.check_count("max_size", max_size),
            max_delay=_checks.check_delay("max_delay", max_delay),
            key_of=_stacking.stack_key if stack else _stacking.any_item,
            join=_stacking.stack if stack else _stacking.as_list,
            split=_stacking.unstack if stack else _stacking.results,
        )

    async def run(
        self, item: ItemT, *, timeout: float | None = None, priority: int = 0
    ) -> ResultT:
        """Run the function for ``item``, together with others; return its result.

        :raises TypeError: with ``stack``, it is not what can be stacked. Or the function has
            returned something else than one result for each item
        :raises Exception: as ``runner.run``, and what the function raises for this item alone

        Cancelling it returns at once, takes a waiting item out, and leaves the others alone. A
        batch that runs goes on to its end.
        """
        return await self._runner.run(self._function, item, timeout=timeout, priority=priority)

    def submit(self, item: ItemT) -> Future[ResultT]:
        """The same from synchronous code, as ``runner.submit``."""
        return self._runner.submit(self._function, item)
