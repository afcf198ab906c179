"""Concurrent calls become one: for models that take many items in little more time than one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Literal, Protocol, TypeVar, overload

from . import _checks, _stacking
from ._batch import BatchFunction
from ._runner import InferenceRunner

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
AnyItemT = TypeVar("AnyItemT")  # where the type of ``self`` is spelt out


class Rows(Protocol):
    """An array or tensor of any library, as far as its rows are concerned."""

    @property
    def shape(self) -> Any:
        """The number of rows, and what each of them has."""
        ...

    @property
    def dtype(self) -> Any:
        """Of its elements."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """One row, or whatever else the library has for an index."""
        ...


class Batcher(Generic[ItemT, ResultT]):
    """Gathers concurrent calls, and has them run together by a function that takes a list.

    ::

        embed = Batcher(runner, runner.model.embed, max_size=64)   # embed(texts) -> vectors

        vector = await embed.run("a text")

    There is no waiting window: what has queued while the model was busy is the next batch, and
    a call that finds it idle runs at once. Each item is a call of its own, in the runner's
    queue, its books and its bounds: it has its own time limit and priority, and whoever is
    cancelled or hangs up leaves the others alone. Any number of event loops and threads may use
    the same ``Batcher``.

    A batch that fails is run again in halves until the item that makes it fail is alone, and it
    alone gets the error. So the function is to have no effects that must not be repeated.
    ``check_cancelled()`` inside it raises when nobody waits any more for any of its items.

    :param runner: runs the batches
    :param func: takes a list of items, also of a single one, and returns as many results in the
        same order: a list, or an array with as many rows. It may be a reference to the model's.
        It runs in a copy of the context in which the ``Batcher`` was made
    :param max_size: of a batch. Where callers have time limits, a batch is no larger than what
        can be done in time, as far as is known from the batches before
    :param max_delay: seconds that the model may stand idle so that a batch grows. It does only
        while calls come so fast that all are answered sooner for it, and nothing else waits
    :param stack: the items are NumPy arrays, or tuples or dicts of arrays, and ``func`` gets one
        array (or a tuple or dict) with one axis more, the first. Only items of equal shapes and
        dtypes share a batch. It returns an array, or a tuple or dict of arrays, each with as many
        rows, or a list. Arrays are taken apart as views: the one copy is that of the items
    :raises TypeError: ``func`` is async or a generator function, or no function; or ``runner`` no
        runner
    :raises ValueError: a number makes no sense
    """

    # What type checkers make of it. As in NumPy, the rows of an array may be of any type: those
    # of a vector are numbers. ``embed: Batcher[str, Vector] = Batcher(...)`` says it exactly.

    @overload
    def __init__(
        self,
        runner: InferenceRunner[Any],
        func: Callable[[list[ItemT]], Sequence[ResultT]],
        *,
        max_size: int,
        max_delay: float = 0.0,
        stack: Literal[False] = False,
    ) -> None: ...

    @overload
    def __init__(
        self: Batcher[AnyItemT, Any],
        runner: InferenceRunner[Any],
        func: Callable[[list[AnyItemT]], Rows],
        *,
        max_size: int,
        max_delay: float = 0.0,
        stack: Literal[False] = False,
    ) -> None: ...

    @overload
    def __init__(
        self,
        runner: InferenceRunner[Any],
        func: Callable[[ItemT], list[ResultT]],
        *,
        max_size: int,
        max_delay: float = 0.0,
        stack: Literal[True],
    ) -> None: ...

    @overload
    def __init__(
        self: Batcher[AnyItemT, Any],
        runner: InferenceRunner[Any],
        func: Callable[[AnyItemT], Rows | tuple[Rows, ...] | dict[Any, Any]],
        *,
        max_size: int,
        max_delay: float = 0.0,
        stack: Literal[True],
    ) -> None: ...

    def __init__(
        self,
        runner: InferenceRunner[Any],
        func: Callable[[Any], Any],
        *,
        max_size: int,
        max_delay: float = 0.0,
        stack: bool = False,
    ) -> None:
        if not isinstance(runner, InferenceRunner):
            raise TypeError(
                f"runner must be an InferenceRunner, not {runner!r}: Batcher(runner, func, ...)"
            )
        _checks.check_func(func)
        _checks.check_plain("func", func)
        _checks.check_plain("func", type(func).__call__)
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
