"""Calls that may run together: what they have in common, and what a batch of them costs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import Context, copy_context
from typing import Any, NamedTuple, cast

from ._call import Call, Port, Work
from ._model import ModelReference, name_of

_FADE = 0.9  # weight of a batch beside the one that ran after it


class LinearCost:
    """Seconds that a batch of n takes, ``fixed + each * n``, learned from those that have run.

    Weighted least squares, in which a batch counts for 0.9 of the one that ran after it; mean,
    variance and covariance are kept up to date in one pass, as Welford does it (Technometrics
    4(3), 1962). That a batch's time is a line, and that it can be learned on the way, is how
    BentoML's dispatcher sees it, too. Neither number is ever negative.

    :ivar fixed: seconds, whatever the size
    :ivar each: seconds for every item
    :ivar latest: seconds that the latest batch has taken
    """

    def __init__(self) -> None:
        self.fixed = 0.0
        self.each = 0.0
        self.latest = 0.0
        self._weight = 0.0
        self._mean_size = 0.0
        self._mean_time = 0.0
        self._variance = 0.0  # of the sizes
        self._covariance = 0.0  # of sizes and times

    def add(self, size: int, seconds: float) -> None:
        """A batch of ``size`` has taken ``seconds``."""
        self.latest = seconds
        self._weight = _FADE * self._weight + 1.0
        share = 1.0 / self._weight
        off_size, off_time = size - self._mean_size, seconds - self._mean_time
        self._mean_size += share * off_size
        self._mean_time += share * off_time
        self._variance += share * (off_size * (size - self._mean_size) - self._variance)
        self._covariance += share * (off_size * (seconds - self._mean_time) - self._covariance)
        # Batches of one size say nothing of the slope: what is known of it stays.
        if self._variance > 1e-3:
            self.each = max(0.0, self._covariance / self._variance)
        self.each = min(self.each, self._mean_time / self._mean_size)
        self.fixed = max(0.0, self._mean_time - self.each * self._mean_size)

    def __call__(self, size: int) -> float:
        """The seconds that a batch of ``size`` is going to take; 0 when none has run yet."""
        return self.fixed + self.each * size


class BatchFunction:
    """The function of one ``Batcher``, and what is known of its batches.

    It stands where the function of a call stands, and tells that calls may be taken together.
    What is learned is guarded by the scheduler's lock.

    :param func: takes what ``join`` makes of the items, returns what ``split`` can take apart
    :param key_of: items may share a batch if this is equal for them; raises for a bad item
    :param join: all items of a batch -> the one argument of ``func``
    :param split: what ``func`` returned, and the number of items -> a list of that many results
    """

    def __init__(
        self,
        func: Any,
        *,
        max_size: int,
        max_delay: float,
        key_of: Callable[[Any], Hashable],
        join: Callable[[list[Any]], Any],
        split: Callable[[Any, int], list[Any]],
    ) -> None:
        self.func = func
        self.__qualname__ = name_of(func)
        self.max_size = max_size
        self.max_delay = max_delay
        self.key_of = key_of
        self.join = join
        self.split = split
        self.cost = LinearCost()
        # A batch is no single caller's: it runs in the context in which the Batcher was made.
        self.context = copy_context()
        # Seconds from one call to the next. They fade as batches do: of one caller alone, whose
        # every gap is longer than its batch, the average is longer than that of the batches.
        self._gap = 0.0
        self._gaps = 0.0  # the weight of all of them
        self._last: float | None = None  # when the latest call came

    def __call__(self, item: Any, /) -> Any:
        """Never: calls of it are run by ``run_batch``."""
        raise NotImplementedError

    def arrived(self, now: float) -> None:
        """One more call has been queued."""
        if self._last is not None:
            # A night without calls is no more than a gap that nobody waits for, and forgotten as
            # soon.
            gap = min(now - self._last, 2.0 * max(self.cost.fixed, self.cost.latest))
            self._gaps = _FADE * self._gaps + 1.0
            self._gap += (gap - self._gap) / self._gaps
        self._last = now

    def seconds(self, count: int) -> float:
        """What ``count`` queued calls are going to take, in as few batches as they need."""
        full, rest = divmod(count, self.max_size)
        return full * self.cost(self.max_size) + (self.cost(rest) if rest else 0.0)

    def wait_until(self, waiting: int, oldest: float) -> float:
        """Until when it pays to let the thread stand idle, since another call is about to come.

        With n calls waiting and the next one due in t seconds: to run now, and the next one
        after that, ends n calls after ``cost(n)`` and one after ``cost(n) + cost(1)``. To wait
        ends n + 1 calls after ``t + cost(n + 1)``. The sum of these times is smaller with
        waiting if ``(n + 1) * t + n * each < fixed``. One caller alone never comes again before
        it has its answer: then t is longer than a whole batch, and nobody waits in vain.

        :param waiting: calls that are there; nothing else is, and it is no full batch
        :param oldest: when the first of them came
        :returns: a time, ``oldest`` or before if it does not pay
        """
        gain = self.cost.fixed - waiting * self.cost.each
        if self._last is None or (waiting + 1) * self._gap >= gain:
            return oldest
        # Who has not come after twice the usual gap is not about to come.
        return min(oldest + self.max_delay, self._last + 2.0 * self._gap)


class BatchGroup(NamedTuple):
    """What calls have in common that may share a batch."""

    function: BatchFunction
    key: Hashable


class BatchCall(Call):
    """One item of a ``Batcher``: a call that others may join when it is taken.

    :raises TypeError: its item is none for this function
    :ivar members: of the batch that this call leads, itself included, from its start to its end;
        written by the inference thread alone, under the scheduler's lock
    :ivar together: those of them that the function runs for now; the inference thread's own
    """

    __slots__ = ("_group", "members", "together")

    # Neither is set to [self] from the start: that would be a reference cycle in every call.
    members: Sequence[BatchCall]
    together: Sequence[BatchCall]

    def __init__(
        self,
        work: Work,
        context: Context,
        deadline: float | None,
        priority: int,
        port: Port,
        waiter: Any,
    ) -> None:
        super().__init__(work, context, deadline, priority, port, waiter)
        function: BatchFunction = work[0]
        item = work[1][0]
        if type(item) is ModelReference:
            raise TypeError(
                f"{item!r} can't be an item of a batch, where nothing would follow it: let the "
                f"function look there itself, and pass what differs from call to call"
            )
        self._group = BatchGroup(function, function.key_of(item))
        self.members = ()
        self.together = ()

    @property
    def name(self) -> str:
        """The name of its function."""
        return name_of(self.function)

    @property
    def group(self) -> BatchGroup:
        """Who may join it; see ``Call.group``, too."""
        return self._group

    @property
    def function(self) -> BatchFunction:
        """What runs it, together with others."""
        return self._group.function

    @property
    def item(self) -> Any:
        """What it is about. To be asked for while it runs."""
        return cast("Work", self.work)[1][0]

    @property
    def limit(self) -> float | None:
        """When nobody waits any more for any of the calls that it runs together with."""
        latest = 0.0
        for call in self.together or [self]:
            if call.deadline is None:
                return None
            latest = max(latest, call.deadline)
        return latest

    def given_up(self, now: float) -> bool:
        """Whether nobody waits any more for any of the calls that it runs together with."""
        return all(Call.given_up(call, now) for call in self.together or [self])
