"""A model on the current thread: loaded, called and destroyed, without a runner."""

from __future__ import annotations

import contextvars
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import pytest

from asgi_infer import NativePolicy
from asgi_infer._model import ModelReference
from asgi_infer.native import openmp
from asgi_infer.workers import ThreadWorker
from asgi_infer.workers._protocol import ModelSpec, Steps
from asgi_infer.workers.thread import ThreadReplica

from ..calls import work_of
from ..threads import on_new_thread


class Model:
    """Knows what happened to it, and on which threads."""

    def __init__(self) -> None:
        log("made")
        self.factor = 2

    def predict(self, value: int) -> int:
        return self.factor * value

    def __del__(self) -> None:
        log("destroyed")


class Cyclic(Model):
    """Would be destroyed by the next garbage collection only."""

    def __init__(self) -> None:
        super().__init__()
        self.me = self


class Slotted:
    """Can't be referred to weakly."""

    __slots__ = ()

    def __del__(self) -> None:
        log("destroyed")


_log: list[tuple[str, int]] = []


def log(what: str) -> None:
    _log.append((what, threading.get_ident()))


@pytest.fixture(autouse=True)
def clean_log() -> Iterator[None]:
    _log.clear()
    yield
    _log.clear()


def logged() -> list[str]:
    return [what for what, _ in _log]


def make_spec(load: Callable[[], Any] | None = Model, **options: Any) -> ModelSpec:
    native = options.pop("native", NativePolicy(nice=0))
    return ModelSpec(name="test", load=load, warmup=options.pop("warmup", None), native=native)


def opened(spec: ModelSpec, worker: ThreadWorker = ThreadWorker()) -> ThreadReplica:
    """The model, on this thread."""
    replica = worker.replica(spec, 0)
    replica.open(lambda: None)
    return replica


def on_worker(spec: ModelSpec, func: Callable[[ThreadReplica], Any]) -> Any:
    """``func(worker)`` where the worker lives, on a thread that ends with it."""

    def live() -> Any:
        worker = opened(spec)
        try:
            return func(worker)
        finally:
            worker.close()

    return on_new_thread(live)


# -- calls -------------------------------------------------------------------------------------


def test_execute() -> None:
    """The function is called with its arguments, and its result returned."""
    assert on_worker(make_spec(), lambda worker: worker.execute(*work_of(max, 3, 4))) == 4


def test_references_are_resolved() -> None:
    """References to the model lead to it, as function and as argument."""
    spec = make_spec()
    model: Any = ModelReference(spec)
    work = work_of(model.predict, model.factor)
    assert on_worker(spec, lambda worker: worker.execute(*work)) == 4


def test_without_a_model() -> None:
    """A worker may have nothing to load: then it only runs functions."""
    assert on_worker(make_spec(None), lambda worker: worker.execute(*work_of(abs, -3))) == 3


def test_callers_context() -> None:
    """A call sees its caller's context variables, and what it sets stays in its copy."""
    variable = contextvars.ContextVar("variable", default="none")

    def exchange() -> str:
        seen = variable.get()
        variable.set("model's")
        return seen

    variable.set("caller's")
    work = work_of(exchange)
    assert on_worker(make_spec(), lambda worker: worker.execute(*work)) == "caller's"
    assert variable.get() == "caller's"


def generate() -> Iterator[int]:
    yield 1


async def coroutine() -> None: ...


async def generate_async() -> AsyncIterator[int]:
    yield 1


class Awaitable:
    def __await__(self) -> Generator[None, None, None]:
        yield


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (generate, "a generator"),
        (coroutine, "a coroutine"),
        (generate_async, "an async generator"),
        (Awaitable, "an awaitable"),
        (lambda: coroutine(), "a coroutine"),
    ],
)
def test_lazy_results_are_refused(func: Callable[[], Any], kind: str) -> None:
    """What has yet to run would run elsewhere: it is closed, and the error says why."""
    with pytest.raises(TypeError, match=f"returned {kind}, which would run elsewhere"):
        on_worker(make_spec(), lambda worker: worker.execute(*work_of(func)))


class Lazy:
    """Looks like an awaitable, but its class doesn't."""

    def __getattr__(self, name: str) -> object:
        return name


@pytest.mark.parametrize(
    "value",
    [None, True, 1, 1.0, "x", b"x", [], (), {}, {1}, np.arange(3), range(3), iter([1]), Lazy()],
    ids=lambda value: type(value).__name__,
)
def test_results_are_passed_on(value: object) -> None:
    """Any other result is handed on as it is, not a copy."""
    assert on_worker(make_spec(), lambda w: w.execute(*work_of(lambda: value))) is value


# -- streams -----------------------------------------------------------------------------------


def take_all(steps: Steps) -> list[Any]:
    """All items, and then the end."""
    items = []
    while True:
        try:
            items.append(next(steps))
        except StopIteration:
            steps.close()
            return items


class Counting(Model):
    def count(self, limit: int) -> Iterator[int]:
        try:
            for number in range(limit):
                log("stepped")
                yield self.factor * number
        finally:
            log("closed")


def test_iterate() -> None:
    """A generator of the model's is stepped and closed on its thread."""
    spec = make_spec(Counting)
    model: Any = ModelReference(spec)
    work = work_of(model.count, 3)
    assert on_worker(spec, lambda worker: take_all(worker.iterate(*work))) == [0, 2, 4]
    assert logged() == ["made", *3 * ["stepped"], "closed", "destroyed"]
    assert len({thread for _, thread in _log}) == 1


def test_iterate_lazily() -> None:
    """Nothing of the generator runs before its first step."""
    work = work_of(Counting().count, 3)
    _log.clear()
    on_worker(make_spec(None), lambda worker: worker.iterate(*work).close())
    assert logged() == []


def test_context_of_all_steps() -> None:
    """The steps and the end share one copy of the caller's context: also when it is closed."""
    variable = contextvars.ContextVar("variable", default="none")
    seen = []

    def generate_in_context() -> Iterator[int]:
        try:
            seen.append(variable.get())
            variable.set("generator's")
            yield 1
        finally:
            seen.append(variable.get())

    def step_and_close(worker: ThreadReplica) -> None:
        steps = worker.iterate(*work)
        next(steps)
        steps.close()

    variable.set("caller's")
    work = work_of(generate_in_context)
    on_worker(make_spec(None), step_and_close)
    assert seen == ["caller's", "generator's"]
    assert variable.get() == "caller's"


@pytest.mark.parametrize(
    ("func", "args", "items"),
    [
        (iter, ([1, None, ""],), [1, None, ""]),
        (map, (int, "12"), [1, 2]),
        (reversed, ("ab",), ["b", "a"]),
    ],
)
def test_any_iterator(func: Any, args: tuple[Any, ...], items: list[Any]) -> None:
    """Iterators that are no generators are stepped as well, and need no ``close()``."""
    work = work_of(func, *args)
    assert on_worker(make_spec(None), lambda worker: take_all(worker.iterate(*work))) == items


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (lambda: [1, 2], "list"),
        (lambda: "text", "str"),
        (lambda: None, "NoneType"),
        (coroutine, "coroutine"),
        (generate_async, "async_generator"),
        (Awaitable, "Awaitable"),
    ],
)
def test_no_generator(func: Callable[[], Any], kind: str) -> None:
    """What can't be stepped is refused, by its type; a coroutine is closed."""
    with pytest.raises(TypeError, match=f"returned a {kind}, and a stream needs a generator"):
        on_worker(make_spec(None), lambda worker: worker.iterate(*work_of(func)))


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (generate, "a generator"),
        (coroutine, "a coroutine"),
        (generate_async, "an async generator"),
        (Awaitable, "an awaitable"),
    ],
)
def test_lazy_items_are_refused(func: Callable[[], Any], kind: str) -> None:
    """So are items that have yet to run; they are closed."""
    work = work_of(lambda: iter([1, func()]))
    with pytest.raises(TypeError, match=f"yielded {kind}, which would run elsewhere"):
        on_worker(make_spec(None), lambda worker: take_all(worker.iterate(*work)))


def test_closed_steps_keep_nothing() -> None:
    """A traceback may lead to the steps: once they are closed they hold no model any more."""

    def live(worker: ThreadReplica) -> bool:
        counting = Counting()
        steps = worker.iterate(*work_of(counting.count, 3))
        next(steps)
        steps.close()
        reference = weakref.ref(counting)
        del counting
        return reference() is None

    assert on_worker(make_spec(None), live)


# -- the model's life --------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Model, Cyclic, Slotted])
def test_destroyed_on_its_thread(model: type) -> None:
    """A closed worker has destroyed its model there and then, reference cycle or not."""
    thread = on_worker(make_spec(model), lambda worker: threading.get_ident())
    assert logged()[-1] == "destroyed"
    assert {each for _, each in _log} == {thread}


def test_no_collection_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that goes by itself costs no garbage collection."""
    monkeypatch.setattr(gc, "collect", lambda: log("collected"))
    on_worker(make_spec(), lambda worker: None)
    assert logged() == ["made", "destroyed"]


def fail(model: object = None) -> NoReturn:
    log("failed")
    raise LookupError("gone")


@contextmanager
def context() -> Iterator[None]:
    log("entered")
    try:
        yield
    finally:
        log("left")


def test_order() -> None:
    """Contexts, model, warm-up; and back. The model goes while its contexts are still in force."""
    native = NativePolicy(nice=0, contexts=(context,))
    spec = make_spec(warmup=lambda model: log(f"warm {model.predict(1)}"), native=native)
    on_worker(spec, lambda worker: log("call"))
    assert logged() == ["entered", "made", "warm 2", "call", "destroyed", "left"]


@pytest.mark.parametrize("stage", ["load", "warmup"])
def test_failure_undoes_what_was_done(stage: str) -> None:
    """When loading or warming up fails, the contexts are left, and no model stays."""
    options: dict[str, Any] = {"load": fail} if stage == "load" else {"warmup": fail}
    spec = make_spec(**options, native=NativePolicy(nice=0, contexts=(context,)))

    def open_and_catch() -> None:
        with pytest.raises(LookupError):
            opened(spec)

    on_new_thread(open_and_catch)
    if stage == "load":
        assert logged() == ["entered", "failed", "left"]
    else:  # the frames of the error held the model to the last
        assert logged() == ["entered", "made", "failed", "left", "destroyed"]


def test_one_description_for_many() -> None:
    """A worker is a description: two models opened from one have nothing in common."""
    worker = ThreadWorker()
    assert worker == ThreadWorker()

    def open_two() -> list[bool]:
        replicas = [opened(make_spec(), worker) for _ in range(2)]
        models = [weakref.ref(each._model) for each in replicas]
        replicas[0].close()
        alive = [model() is not None for model in models]
        replicas[1].close()
        return alive

    assert on_new_thread(open_two) == [False, True]


def test_load_that_returns_a_coroutine() -> None:
    """A coroutine is no model: an async loader in disguise is found out, and closed."""
    with pytest.raises(TypeError, match="returned a coroutine"):
        on_worker(make_spec(lambda: coroutine()), lambda worker: None)


# -- native threads ----------------------------------------------------------------------------


def test_runtimes_that_load_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread count is set ahead of the model and again after it, on what it brought along."""
    monkeypatch.setattr(openmp, "limit_threads", lambda count: log(f"limit {count}"))
    on_worker(make_spec(native=NativePolicy(nice=0, threads=3)), lambda worker: None)
    assert logged() == ["limit 3", "made", "limit 3", "destroyed"]
