"""What the tests run where the model lives: to be imported there, so it needs little itself."""

from __future__ import annotations

import contextvars
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from asgi_infer._call import check_cancelled
from asgi_infer._errors import CallCancelled

from .remote_gates import RemoteEvent, RemoteGate, RemoteLog

if TYPE_CHECKING:  # numpy takes as long to import as all the rest of a process
    import numpy as np

    Array = np.ndarray[Any, Any]

LIMIT = 10.0


class Part:
    """What a model has as an attribute."""

    factor = 3

    def triple(self, number: int) -> int:
        return self.factor * number


class Model:
    """Counts its calls, among other things.

    :ivar born: where it was made: process and thread
    :ivar sizes: of the batches that it got
    """

    def __init__(self) -> None:
        self.calls = 0
        self.part = Part()
        self.born = where()
        self.sizes: list[int] = []

    def count(self) -> int:
        self.calls += 1
        return self.calls

    def add(self, left: int, right: int = 0) -> int:
        return left + right

    def generate(self, items: int) -> Iterator[int]:
        yield from range(items)

    def double(self, numbers: list[int]) -> list[int]:
        self.sizes.append(len(numbers))
        if any(number < 0 for number in numbers):
            raise ValueError(f"{min(numbers)} is negative")
        return [2 * number for number in numbers]

    def scale(self, arrays: Array) -> Array:
        self.sizes.append(len(arrays))
        return arrays * 2.0

    def taken(self) -> list[int]:
        sizes, self.sizes = self.sizes, []
        return sizes

    def __call__(self, number: int) -> int:
        return -number


@dataclass(frozen=True)
class Pair:
    """Something that is no plain value, with an array in it."""

    name: str
    array: Array


# -- results -----------------------------------------------------------------------------------


def echo(value: Any) -> Any:
    return value


def where() -> tuple[int, int]:
    """The process and the thread."""
    return os.getpid(), threading.get_native_id()


def born(model: Model) -> tuple[int, int]:
    return model.born


def apply(function: Any, *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


def fill(array: Array) -> float:
    """Change the argument in place; say what is in it."""
    array[...] = 7.0
    return float(array.sum())


def append(items: list[int]) -> int:
    items.append(1)
    return len(items)


def make_lambda() -> Any:
    return lambda: None


def one_too_many(items: list[int]) -> list[int]:
    return [*items, 0]


def describe_all(items: list[Any]) -> list[str]:
    return [repr(item) for item in items]


async def coroutine_function() -> None: ...


def return_coroutine() -> Any:
    return coroutine_function()


def return_generator() -> Any:
    return (number for number in range(3))


VARIABLE = contextvars.ContextVar("VARIABLE", default="the default")

STATE = ["as imported"]


def read_variable() -> str:
    return VARIABLE.get()


def read_state() -> str:
    return STATE[0]


def use(megabytes: int) -> None:
    """Sleep a few times, and touch new memory."""
    for _ in range(4):
        time.sleep(0.001)
    bytearray(megabytes * 2**20)


# -- errors ------------------------------------------------------------------------------------


class PlainError(Exception):
    """With arguments and an attribute."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text, number)
        self.extra = [text]


class StubbornError(Exception):
    """Pickles, and can't be made again from that."""

    def __init__(self, text: str, *, number: int) -> None:
        super().__init__(text)
        self.number = number


class LockedError(Exception):
    """Does not pickle."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class MuteError(Exception):
    """Can't be shown."""

    def __str__(self) -> str:
        raise ValueError("no text")

    def __repr__(self) -> str:
        raise ValueError("no text either")


class ReducingError(Exception):
    """Fails when it is pickled."""

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("not to be pickled")


def fail_plain() -> NoReturn:
    raise PlainError("plain", 5)


def fail_with_key() -> NoReturn:
    raise KeyError("missing")


def fail_with_os_error() -> NoReturn:
    raise FileNotFoundError(2, "No such file", "model.bin")


def fail_stubborn() -> NoReturn:
    raise StubbornError("stubborn", number=5)


def fail_locked() -> NoReturn:
    raise LockedError("locked")


def fail_local() -> NoReturn:
    class LocalError(Exception):
        """Nobody can import it."""

    raise LocalError("local")


def fail_mute() -> NoReturn:
    raise MuteError


def fail_reducing() -> NoReturn:
    raise ReducingError("reducing")


def fail_with_note() -> NoReturn:
    error = ValueError("noted")
    error.add_note("while reading page 7")
    raise error


def fail_with_cause() -> NoReturn:
    try:
        fail_with_key()
    except KeyError as error:
        raise ValueError("because of that") from error


def fail_with_group() -> NoReturn:
    raise ExceptionGroup("several", [ValueError("one"), TypeError("two")])


def fail_in_a_circle() -> NoReturn:
    error, other = ValueError("first"), ValueError("second")
    error.__cause__, other.__cause__ = other, error
    raise error


def fail_at_length() -> NoReturn:
    raise ValueError("x" * 10**6)


def fail_for_client() -> NoReturn:
    from starlette.exceptions import HTTPException

    raise HTTPException(status_code=422, detail="no face in it", headers={"X-Faces": "0"})


def end(kind: type[BaseException]) -> NoReturn:
    raise kind("the end")


# -- held open ---------------------------------------------------------------------------------


def notice(gate: RemoteGate, noticed: RemoteEvent, patience: float = 0.0) -> str:
    """Be held open, and ask in the end whether anybody still waits.

    :param patience: seconds that the news may take, where it has a way to go
    """
    gate(None)
    until = time.monotonic() + patience
    try:
        check_cancelled()
        while time.monotonic() < until:
            check_cancelled()
    except CallCancelled:
        noticed.set()
        raise
    return "done"


def ask_until_late(noticed: RemoteEvent) -> str:
    """Ask until nobody waits any more."""
    end = time.monotonic() + LIMIT
    try:
        while time.monotonic() < end:
            check_cancelled()
    except CallCancelled:
        noticed.set()
        raise
    return "nobody came"


def ask_in_batch(gate: RemoteGate, noticed: RemoteEvent, items: list[int]) -> list[int]:
    """Be held open with a batch, and ask in the end."""
    notice(gate, noticed, LIMIT)
    return items


def hold_first(gate: RemoteGate, fails: bool, result: int) -> int:
    """Be held open, and then return or raise."""
    gate(None)
    if fails:
        raise ValueError(result)
    return result


def grab_the_gil(entered: RemoteEvent, release: RemoteEvent) -> int:
    """Read from a pipe as a binding does that never releases the GIL."""
    fd = os.open(release._path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.set_blocking(fd, True)
        entered.set()
        return int(ctypes.PyDLL(None).read(fd, ctypes.create_string_buffer(1), 1))
    finally:
        os.close(fd)


# -- streams -----------------------------------------------------------------------------------


def fail_midway(items: int) -> Iterator[int]:
    yield from range(items)
    fail_plain()


def make_arrays(items: int, size: int) -> Iterator[Array]:
    import numpy as np

    for number in range(items):
        yield np.full(size, float(number))


def step_where(items: int) -> Iterator[tuple[int, int]]:
    for _ in range(items):
        yield where()


def end_stream(kind: type[BaseException]) -> Iterator[int]:
    yield 1
    raise kind("the end")


def yield_lambda() -> Iterator[Any]:
    yield 1
    yield lambda: None


def fail_in_finally() -> Iterator[int]:
    try:
        yield 1
        yield 2
    finally:
        fail_plain()


def ask_between(gate: RemoteGate, noticed: RemoteEvent) -> Iterator[int]:
    """Be held open within a step, and ask at its end."""
    yield 1
    notice(gate, noticed, LIMIT)
    yield 2


# -- lifecycle ---------------------------------------------------------------------------------


def load_nothing() -> NoReturn:
    raise PlainError("no weights", 5)


def load_held(gate: RemoteGate) -> Model:
    gate(None)
    return Model()


def warm_up(log: RemoteLog, model: Model) -> None:
    model.count()
    log(where())


def warm_up_badly(model: Model) -> NoReturn:
    raise PlainError(f"cold after {model.count()}", 5)


class Destroyed:
    """Says where it was destroyed."""

    def __init__(self, log: RemoteLog) -> None:
        self.log = log

    def __del__(self) -> None:
        self.log(where())


def exit_now(code: int) -> NoReturn:
    os._exit(code)
