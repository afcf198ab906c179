"""What a simulation is asked to serve."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace


@dataclass(frozen=True, eq=False, kw_only=True)
class Batching:
    """A function that serves many requests at once, as a ``Batcher`` has it.

    :param max_size: of a batch
    :param fixed: seconds that a batch takes, whatever its size
    :param each: seconds more for every request in it
    :param max_delay: as of ``Batcher``
    """

    max_size: int = 64
    fixed: float = 0.0
    each: float = 0.0
    max_delay: float = 0.0


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


def burst(request: Request, count: int) -> list[Request]:
    """``count`` requests like ``request``, all at once. With ``retries``: a retry storm."""
    return [request] * count


def steady(request: Request, *, rate: float, duration: float) -> list[Request]:
    """Requests like ``request``, ``rate`` a second, evenly spaced, from its time on."""
    count = round(rate * duration)
    return [replace(request, at=request.at + number / rate) for number in range(count)]


def poisson(request: Request, *, rate: float, duration: float, seed: int = 0) -> list[Request]:
    """Requests like ``request``, ``rate`` a second on average, as independent clients come.

    :param seed: the same one gives the same times
    """
    generator = random.Random(seed)  # noqa: S311  # no secret
    requests = []
    at = request.at + generator.expovariate(rate)
    while at < request.at + duration:
        requests.append(replace(request, at=at))
        at += generator.expovariate(rate)
    return requests
