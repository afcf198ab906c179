"""The middleware in real applications: Starlette's, mounted ones, and bare ASGI callables."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_infer import (
    CallFailed,
    InferenceError,
    InferenceMiddleware,
    InferenceRunner,
    runner_from,
)
from asgi_infer._call import current_caller
from asgi_infer._client import Receive, Scope, Send
from asgi_infer.middleware import InvalidDeadline

from .connections import Connection, respond
from .gates import LIMIT, Gate

BACKENDS = [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})]
Options = tuple[str, dict[str, Any]]


@pytest.fixture(params=BACKENDS, ids=["asyncio", "uvloop", "trio"])
def connect(request: pytest.FixtureRequest) -> Callable[..., TestClient]:
    """Makes test clients on every event loop."""
    backend, options = request.param
    return functools.partial(TestClient, backend=backend, backend_options=options)


@pytest.fixture
def runner() -> Iterator[InferenceRunner[None]]:
    """A runner with room for one, which is stopped in the end."""
    with InferenceRunner[None](max_queue=1) as runner:
        yield runner


def overload(runner: InferenceRunner[Any], gate: Gate) -> None:
    """Fill the runner, so that it refuses the next call."""
    runner.submit(gate, 1)
    gate.wait_entered()
    runner.submit(gate, 1)


async def predict(request: Request) -> Response:
    """An endpoint that makes a call, with the time limit that it is asked for."""
    timeout = float(request.query_params.get("timeout", "10"))
    result = await runner_from(request).run(abs, -5, timeout=timeout)
    return JSONResponse(result)


async def predict_over_websocket(websocket: WebSocket) -> None:
    """Calls, before and after the WebSocket is accepted, as often as there are messages."""
    runner = runner_from(websocket)
    if "early" in websocket.query_params:
        await runner.run(abs, -5)
    await websocket.accept()
    with contextlib.suppress(WebSocketDisconnect):
        while text := await websocket.receive_text():
            await websocket.send_json(await runner.run(abs, int(text)))


ROUTES = [Route("/predict", predict), WebSocketRoute("/ws", predict_over_websocket)]


def application(runner: InferenceRunner[Any], **options: Any) -> Starlette:
    """An application with the routes above: its own, and those of a mounted application."""
    return Starlette(
        routes=[*ROUTES, Mount("/mounted", Starlette(routes=ROUTES))],
        middleware=[Middleware(InferenceMiddleware, runner=runner, **options)],
    )


# -- how it is made ----------------------------------------------------------------------------


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that does nothing."""


def test_names_must_differ() -> None:
    """Two runners of one name, or none at all, are refused."""
    for runners, names in (
        ([InferenceRunner[None](), InferenceRunner[None]()], "'inference', 'inference'"),
        ([], "none"),
    ):
        with pytest.raises(ValueError, match=f"different names, not {names}"):
            InferenceMiddleware(nothing, runner=runners)


@pytest.mark.parametrize("option", ["grace", "startup_timeout"])
@pytest.mark.parametrize("value", [math.nan, "5"])
def test_unfit_times(option: str, value: Any) -> None:
    """A time that is none is refused when the middleware is made, not when it is needed."""
    options: Any = {option: value}
    with pytest.raises(ValueError, match=option):
        InferenceMiddleware(nothing, runner=InferenceRunner[None](), **options)


@pytest.mark.parametrize("value", ["", "a b", "a:b", "ä", b"x-time", 5])
def test_unfit_deadline_header(value: Any) -> None:
    """A deadline header that no client could send is refused."""
    with pytest.raises(ValueError, match="deadline_header"):
        InferenceMiddleware(nothing, runner=InferenceRunner[None](), deadline_header=value)


# -- in an application -------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/mounted"])
def test_calls(connect: Callable[..., TestClient], prefix: str) -> None:
    """Endpoints of the application and of a mounted one call the model, and the client sees
    how long that took."""
    runner = InferenceRunner(lambda: 5)
    with connect(application(runner)) as client:
        assert runner.statistics().state == "ready"
        response = client.get(f"{prefix}/predict")
        assert (response.status_code, response.json()) == (200, 5)
        assert response.headers["server-timing"].startswith("queue;dur=")
        with client.websocket_connect(f"{prefix}/ws") as websocket:
            for number in range(3):
                websocket.send_text(str(-number))
                assert websocket.receive_json() == number
    assert runner.statistics().state == "closed"


def test_client_after_client(connect: Callable[..., TestClient]) -> None:
    """One application, and its runner, live through several lifespans on several loops."""
    runner = InferenceRunner[None]()
    app = application(runner)
    for _ in range(3):
        with connect(app) as client:
            assert client.get("/predict").json() == 5
        assert runner.statistics().state == "closed"


def test_bare_client(runner: InferenceRunner[None], connect: Callable[..., TestClient]) -> None:
    """Without lifespan, as under a bare test client, the runner starts with its first call."""
    client = connect(application(runner))
    assert client.get("/predict").json() == 5
    assert client.get("/mounted/predict").json() == 5


def test_without_middleware() -> None:
    """Without the middleware the answer is a bare 503, and the log explains."""
    client = TestClient(Starlette(routes=ROUTES))
    response = client.get("/predict")
    assert response.status_code == 503
    assert response.text == "The service is not ready. Try again later."


def test_several_runners() -> None:
    """Endpoints choose among several runners by name."""

    async def both(request: Request) -> Response:
        runners = [runner_from(request, name) for name in ("a", "b")]
        return JSONResponse([each.name for each in runners if await each.run(bool, 1)])

    runners = [InferenceRunner[None](name=name) for name in ("a", "b")]
    middleware = [Middleware(InferenceMiddleware, runner=runners)]
    with TestClient(Starlette(routes=[Route("/", both)], middleware=middleware)) as client:
        assert client.get("/").json() == ["a", "b"]


def test_middleware_within_middleware() -> None:
    """A mounted application may have a runner of its own, beside those of the outer one."""

    async def names(request: Request) -> Response:
        found = [runner_from(request, name) for name in ("inner", "outer")]
        return JSONResponse([await each.run(str.upper, each.name) for each in found])

    with InferenceRunner[None](name="inner") as inner:
        outer = InferenceRunner[None](name="outer")
        mounted = InferenceMiddleware(Starlette(routes=[Route("/", names)]), runner=inner)
        app = Starlette(
            routes=[Mount("/mounted", mounted)],
            middleware=[Middleware(InferenceMiddleware, runner=outer)],
        )
        with TestClient(app) as client:
            assert client.get("/mounted/").json() == ["INNER", "OUTER"]
            assert client.get("/mounted/").headers["server-timing"].count("infer") == 1


def test_the_application_s_own_lifespan() -> None:
    """The application's lifespan runs while the model is loaded, and keeps its state."""
    states: list[str] = []
    runner = InferenceRunner[None]()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        states.append(runner.statistics().state)
        yield {"own": await runner.run(abs, -1)}
        states.append(runner.statistics().state)

    async def own(request: Request) -> Response:
        assert runner_from(request) is runner
        return JSONResponse(request.state.own)

    app = Starlette(
        routes=[Route("/", own)],
        lifespan=lifespan,
        middleware=[Middleware(InferenceMiddleware, runner=runner)],
    )
    with TestClient(app) as client:
        assert client.get("/").json() == 1
    assert states == ["ready", "ready"]


def test_load_failure_ends_the_startup() -> None:
    """With Starlette's test client too, a model that doesn't load is an application that
    doesn't start."""

    def load() -> None:
        raise OSError("no weights")

    with (
        pytest.raises(OSError, match="no weights"),
        TestClient(application(InferenceRunner(load))),
    ):
        raise AssertionError


@pytest.mark.anyio
async def test_other_scopes_pass() -> None:
    """What is neither lifespan, HTTP nor WebSocket is passed on as it came."""
    seen: list[Any] = []

    async def app(*arguments: Any) -> None:
        seen.extend(arguments)

    scope, connection = {"type": "custom"}, Connection()
    middleware = InferenceMiddleware(app, runner=InferenceRunner[None]())
    await middleware(scope, connection.receive, connection.send)
    assert seen == [{"type": "custom"}, connection.receive, connection.send]


@pytest.mark.anyio
async def test_the_caller_is_the_client_for_its_request_only() -> None:
    """What the server's own task does after a request, it does not do for that client."""
    middleware = InferenceMiddleware(nothing, runner=InferenceRunner[None]())
    await Connection().serve(middleware)
    assert current_caller.get() is None


# -- responses that have begun -----------------------------------------------------------------


@pytest.mark.anyio
async def test_client_leaves_a_stream(runner: InferenceRunner[None]) -> None:
    """A client that hangs up in the middle of a stream is no error: nothing is left to log."""
    closed: list[bool] = []

    def endless() -> Iterator[bytes]:
        try:
            while True:
                yield b"item"
        finally:
            closed.append(True)

    async def stream(request: Request) -> Response:
        return StreamingResponse(waiting_for_the_end(runner_from(request).stream(endless)))

    async def waiting_for_the_end(items: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for item in items:
            yield item
            connection.hang_up()
            await anyio.sleep(0.001)  # the items go on, and nobody reads them

    connection = Connection()
    connection.scope["asgi"]["spec_version"] = "2.4"  # the response does not look for itself
    connection.scope["method"] = "GET"
    connection.body(b"")
    middleware = [Middleware(InferenceMiddleware, runner=runner)]
    await connection.serve(Starlette(routes=[Route("/", stream)], middleware=middleware))
    await runner.wait_idle()
    assert closed == [True]
    assert connection.status == 200


@pytest.mark.anyio
async def test_errors_in_a_response_that_has_begun(runner: InferenceRunner[None]) -> None:
    """What fails in the middle of a response reaches the server, which cuts the response off."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"first"
        raise HTTPException(418)

    async def stream(request: Request) -> Response:
        return StreamingResponse(broken())

    connection = Connection()
    connection.scope["method"] = "GET"
    connection.body(b"")
    middleware = [Middleware(InferenceMiddleware, runner=runner)]
    app = Starlette(routes=[Route("/", stream)], middleware=middleware)
    with pytest.raises(RuntimeError, match="response already started"):
        await connection.serve(app)


# -- refusals ----------------------------------------------------------------------------------

Refuse = Callable[[InferenceRunner[Any], Gate], None]


def stop(runner: InferenceRunner[Any], gate: Gate) -> None:
    """Have the runner refuse calls because it is stopping."""
    runner.submit(gate, 1)
    gate.wait_entered()
    runner.shutdown(wait=False)


REFUSALS = {"overloaded": overload, "shutting down": stop}


@pytest.mark.parametrize("prefix", ["", "/mounted"])
@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals(
    runner: InferenceRunner[None],
    gate: Gate,
    connect: Callable[..., TestClient],
    reason: str,
    prefix: str,
) -> None:
    """With no handler registered, overload and drain are 503 with ``Retry-After``: in the
    application, in a mounted one, as a WebSocket's denial, and as its close code."""
    client = connect(application(runner))
    with client.websocket_connect(f"{prefix}/ws") as websocket:
        REFUSALS[reason](runner, gate)
        response = client.get(f"{prefix}/predict")
        assert response.status_code == 503
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.text == f"The service is {reason}. Try again later."
        with (
            pytest.raises(WebSocketDenialResponse) as denied,
            client.websocket_connect(f"{prefix}/ws?early=1"),
        ):
            raise AssertionError
        assert denied.value.status_code == 503
        assert 1 <= int(denied.value.headers["retry-after"]) <= 60
        websocket.send_text("1")
        with pytest.raises(WebSocketDisconnect) as closed:
            websocket.receive_json()
        assert closed.value.code == 1013


@pytest.mark.parametrize("prefix", ["", "/mounted"])
def test_not_ready(connect: Callable[..., TestClient], prefix: str) -> None:
    """A model that did not load is 503 with ``Retry-After``, and the reason stays inside."""

    def load() -> None:
        raise OSError("secret path")

    runner = InferenceRunner(load)
    client = connect(application(runner))
    first, second = (client.get(f"{prefix}/predict") for _ in range(2))
    assert (first.status_code, second.status_code) == (503, 503)
    assert 1 <= int(second.headers["retry-after"]) <= 60
    assert "secret" not in first.text + second.text


@pytest.mark.parametrize("prefix", ["", "/mounted"])
def test_deadlines(runner: InferenceRunner[None], gate: Gate, prefix: str) -> None:
    """A call whose time is up is 504, with ``Retry-After`` if it never ran."""
    client = TestClient(application(runner))
    running = client.get(f"{prefix}/predict?timeout=10")
    assert running.status_code == 200
    runner.submit(gate, 1)
    gate.wait_entered()
    waiting = client.get(f"{prefix}/predict?timeout=0.05")
    assert waiting.status_code == 504
    assert 1 <= int(waiting.headers["retry-after"]) <= 60
    assert waiting.text == "The service is too busy to answer in time. Try again later."


def test_deadline_of_a_running_call(runner: InferenceRunner[None], gate: Gate) -> None:
    """A call that had started when its time was up is 504 without ``Retry-After``."""

    async def slow(request: Request) -> Response:
        return JSONResponse(await runner_from(request).run(gate, 1, timeout=0.2))

    middleware = [Middleware(InferenceMiddleware, runner=runner)]
    client = TestClient(Starlette(routes=[Route("/", slow)], middleware=middleware))
    runner.submit(abs, -1).result(LIMIT)  # the thread has started
    response = client.get("/")
    assert (response.status_code, "retry-after" in response.headers) == (504, False)


def test_errors_of_the_model(runner: InferenceRunner[None]) -> None:
    """What a model raises is the application's to handle; an exit is a 500 without details."""

    async def failing(request: Request) -> Response:
        error = {"exit": SystemExit("secret"), "value": ValueError("secret")}

        def fail() -> None:
            raise error[request.query_params["kind"]]

        return JSONResponse(await runner_from(request).run(fail))

    middleware = [Middleware(InferenceMiddleware, runner=runner)]
    app = Starlette(routes=[Route("/", failing)], middleware=middleware)
    client = TestClient(app, raise_server_exceptions=False)
    for kind in ("exit", "value"):
        response = client.get(f"/?kind={kind}")
        assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert client.get("/?kind=exit").status_code == 500


class CallingMiddleware:
    """A middleware that makes a call itself, inside ours and outside of error handlers."""

    def __init__(self, app: Any, *, runner: InferenceRunner[Any]) -> None:
        self.app = app
        self.runner = runner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.runner.run(abs, -1)
        await self.app(scope, receive, send)


def test_error_in_an_inner_middleware(runner: InferenceRunner[None], gate: Gate) -> None:
    """A refusal raised where no handler of the framework's is, is answered all the same."""
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(InferenceMiddleware, runner=runner),
            Middleware(CallingMiddleware, runner=runner),
        ],
    )
    overload(runner, gate)
    response = TestClient(app).get("/predict")
    assert response.status_code == 503
    assert 1 <= int(response.headers["retry-after"]) <= 60


def test_own_handlers_go_first(runner: InferenceRunner[None], gate: Gate) -> None:
    """An application may answer this package's errors in its own way."""

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, InferenceError)
        return PlainTextResponse(type(error).__name__, 429, error.headers)

    app = application(runner)
    app.add_exception_handler(InferenceError, answer)
    overload(runner, gate)
    response = TestClient(app).get("/predict")
    assert (response.status_code, response.text) == (429, "QueueFull")


def test_bare_callable(runner: InferenceRunner[None], gate: Gate) -> None:
    """An application without a framework has lifespan, calls, and refusals answered."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "no lifespan here"
        assert scope["state"]["asgi_infer"] == {"inference": runner}
        await respond(send, str(await runner.run(abs, -7)))

    with TestClient(InferenceMiddleware(app, runner=runner)) as client:
        assert client.get("/").text == "7"
        overload(runner, gate)
        assert client.get("/").status_code == 503
        gate.release.set()


# -- responses ---------------------------------------------------------------------------------


def test_streaming_response(connect: Callable[..., TestClient]) -> None:
    """A stream after a call, with calls in it, reaches the client whole."""

    async def stream(request: Request) -> Response:
        runner = runner_from(request)
        first = await runner.run(abs, -1)

        async def numbers() -> AsyncIterator[str]:
            yield str(first)
            for number in range(2, 50):
                yield f",{await runner.run(abs, -number)}"

        return StreamingResponse(numbers())

    middleware = [Middleware(InferenceMiddleware, runner=InferenceRunner[None]())]
    with connect(Starlette(routes=[Route("/", stream)], middleware=middleware)) as client:
        text = client.get("/").text
    assert [int(number) for number in text.split(",")] == list(range(1, 50))


def test_uploads(connect: Callable[..., TestClient]) -> None:
    """A body read before, between and after calls arrives whole."""

    async def upload(request: Request) -> Response:
        runner, parts = runner_from(request), []
        async for part in request.stream():
            parts.append(part)
            await runner.run(abs, -1)
        return JSONResponse(await runner.run(len, b"".join(parts)))

    route = Route("/", upload, methods=["POST"])
    middleware = [Middleware(InferenceMiddleware, runner=InferenceRunner[None]())]
    with connect(Starlette(routes=[route], middleware=middleware)) as client:
        assert client.post("/", content=b"x" * 1_000_000).json() == 1_000_000
        assert client.post("/", content=b"").json() == 0


# -- the deadline header -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "-1", "0", "0.0", "1e308", "soon", "", "1,5", "0x10", "1 2"]
)
def test_deadlines_that_are_none(runner: InferenceRunner[None], value: str) -> None:
    """A header that is no number of seconds above 0 is the client's fault: 400."""
    client = TestClient(application(runner, deadline_header="X-Time"))
    response = client.get("/predict", headers={"x-time": value})
    assert response.status_code == 400
    assert response.text == "The deadline must be a number of seconds greater than 0."
    assert runner.statistics().submitted == 0


def test_invalid_deadline_is_an_inference_error() -> None:
    """Whoever handles this package's errors handles this one."""
    assert issubclass(InvalidDeadline, InferenceError)
    assert not issubclass(InvalidDeadline, CallFailed)


@pytest.mark.parametrize("header", ["0.05", " 0.05 ", "5e-2"])
def test_client_shortens_the_time(runner: InferenceRunner[None], gate: Gate, header: str) -> None:
    """A client may give less time than the application does."""
    client = TestClient(application(runner, deadline_header="X-Time"))
    runner.submit(gate, 1)
    gate.wait_entered()
    assert client.get("/predict?timeout=10", headers={"X-Time": header}).status_code == 504


def test_client_cannot_lengthen_the_time(runner: InferenceRunner[None], gate: Gate) -> None:
    """A client gets no more time than the application gives."""
    client = TestClient(application(runner, deadline_header="X-Time"))
    runner.submit(gate, 1)
    gate.wait_entered()
    response = client.get("/predict?timeout=0.05", headers={"X-Time": str(10 * LIMIT)})
    assert response.status_code == 504


def test_the_header_is_opt_in(runner: InferenceRunner[None]) -> None:
    """Where no header was named, none is looked at."""
    client = TestClient(application(runner))
    assert client.get("/predict", headers={"X-Time": "nan"}).status_code == 200
    named = TestClient(application(runner, deadline_header="X-Time"))
    assert named.get("/predict", headers={"X-Other": "nan"}).status_code == 200
    assert named.get("/predict").status_code == 200


def test_deadline_of_a_websocket(runner: InferenceRunner[None]) -> None:
    """A WebSocket with a bad deadline is denied."""
    client = TestClient(application(runner, deadline_header="X-Time"))
    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        client.websocket_connect("/ws", headers={"X-Time": "nan"}),
    ):
        raise AssertionError
    assert denied.value.status_code == 400


# -- what is around it -------------------------------------------------------------------------


class Outer(BaseHTTPMiddleware):
    """A middleware that hides disconnects from what is inside."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


class Plain:
    """A middleware that hides nothing."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def plain(app: Any) -> Any:
    """A middleware that is a function."""
    return app


def test_warning_at_startup(caplog: pytest.LogCaptureFixture) -> None:
    """The warning comes with the startup, where somebody reads it."""
    ours = Middleware(InferenceMiddleware, runner=InferenceRunner[None]())
    with TestClient(Starlette(middleware=[Middleware(Outer), ours])):
        assert "Outer is a BaseHTTPMiddleware outside" in caplog.text


@pytest.mark.parametrize(
    ("outside", "inside", "warns"),
    [
        ([Outer], [], True),
        ([plain, Plain, Outer], [], True),
        ([], [Outer], False),
        ([Plain, plain], [Outer, Plain], False),
        ([], [], False),
    ],
)
def test_base_http_middleware_outside(
    runner: InferenceRunner[None],
    caplog: pytest.LogCaptureFixture,
    outside: list[Any],
    inside: list[Any],
    warns: bool,
) -> None:
    """A ``BaseHTTPMiddleware`` outside of ours is warned of, once; inside it does no harm."""
    ours = Middleware(InferenceMiddleware, runner=runner)
    stack = [*map(Middleware, outside), ours, *map(Middleware, inside)]
    client = TestClient(Starlette(routes=ROUTES, middleware=stack))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert client.get("/predict").json() == 5
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == warns
    assert all("Outer is a BaseHTTPMiddleware outside" in warning for warning in warnings)
    assert all("Add InferenceMiddleware last" in warning for warning in warnings)
