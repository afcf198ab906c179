"""What a simulation is asked to serve."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from .. import _checks


@dataclass(frozen=True, eq=False, kw_only=True)
class Batching:
    """A function that serves many requests at once, as a ``Batcher`` has it.

    :param max_size: of a batch
    :param fixed: seconds that a batch takes, whatever its size
    :param each: seconds more for every request in it
    :param max_delay: as of ``Batcher``
    :raises ValueError: a number makes no sense
    """

    max_size: int = 64
    fixed: float = 0.0
    each: float = 0.0
    max_delay: float = 0.0

    def __post_init__(self) -> None:
        _checks.check_count("max_size", self.max_size)
        for name in ("fixed", "each", "max_delay"):
            _checks.check_delay(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One client, and what it wants.

    :param at: when it comes, in seconds
    :param seconds: what its call takes; of a stream, what each item takes
    :param timeout: its time limit, or None
    :param priority: as of ``InferenceRunner.run``
    :param size: bytes of its arguments
    :param patience: seconds after which it hangs up, or None
    :param retries: how often it comes again when it is refused, as ``Retry-After`` says
    :param batching: the function that serves it, if that takes several at once; ``seconds``
        then counts for nothing
    :param items: how many a stream has; 0 for a plain call
    :param pause: seconds that the consumer of a stream spends on each item
    :param buffer: as of ``InferenceRunner.stream``, as are the next two
    :param stall_timeout: seconds, or None
    :param interleave: let other calls run between two items
    :raises ValueError: a number makes no sense
    """

    at: float = 0.0
    seconds: float = 0.1
    timeout: float | None = None
    priority: int = 0
    size: int = 0
    patience: float | None = None
    retries: int = 0
    batching: Batching | None = None
    items: int = 0
    pause: float = 0.0
    buffer: int = 16
    stall_timeout: float | None = 10.0
    interleave: bool = False

    def __post_init__(self) -> None:
        for name in ("at", "seconds", "pause"):
            _checks.check_delay(name, getattr(self, name))
        for name in ("timeout", "patience", "stall_timeout"):
            if getattr(self, name) is not None:
                _checks.check_seconds(name, getattr(self, name))
        for name in ("size", "retries", "items"):
            _check_number(name, getattr(self, name))
        _checks.check_priority(self.priority)
        _checks.check_count("buffer", self.buffer)


def burst(request: Request, count: int) -> list[Request]:
    """``count`` requests like ``request``, all at once. With ``retries``: a retry storm."""
    return [request] * count


def steady(request: Request, *, rate: float, duration: float) -> list[Request]:
    """Requests like ``request``, ``rate`` a second, evenly spaced, from its time on.

    :raises ValueError: there is no such rate
    """
    _check_rate(rate)
    count = round(rate * duration)
    return [replace(request, at=request.at + number / rate) for number in range(count)]


def poisson(request: Request, *, rate: float, duration: float, seed: int = 0) -> list[Request]:
    """Requests like ``request``, ``rate`` a second on average, as independent clients come.

    :param seed: the same one gives the same times
    :raises ValueError: there is no such rate
    """
    _check_rate(rate)
    generator = random.Random(seed)  # noqa: S311  # no secret
    requests = []
    at = request.at + generator.expovariate(rate)
    while at < request.at + duration:
        requests.append(replace(request, at=at))
        at += generator.expovariate(rate)
    return requests


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, not {value!r}")


def _check_rate(rate: Any) -> None:
    if not isinstance(rate, Real) or not 0 < rate < math.inf:  # type: ignore[operator]
        raise ValueError(f"rate must be a number of requests a second, above 0, not {rate!r}")
