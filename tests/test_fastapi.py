"""FastAPI: dependencies, routers, mounts, ``def`` endpoints, background tasks, overrides."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, File, Request, WebSocket
from fastapi.testclient import TestClient
from starlette.responses import StreamingResponse
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from asgi_infer import InferenceMiddleware, InferenceRunner
from asgi_infer.fastapi import RunnerDep, get_runner, named

from .gates import LIMIT, Gate

OcrDep = Annotated[InferenceRunner[Any], Depends(named("ocr"))]

router = APIRouter()


@router.get("/awaited")
async def awaited(runner: RunnerDep) -> int:
    """Await a call."""
    return await runner.run(abs, -1)


@router.get("/waited")
def waited(runner: RunnerDep) -> int:
    """Wait for a call in a ``def`` endpoint, which FastAPI runs in a thread."""
    assert threading.current_thread() is not threading.main_thread()
    return runner.submit(abs, -2).result(LIMIT)


@router.websocket("/ws")
async def over_websocket(websocket: WebSocket, runner: RunnerDep) -> None:
    """Make a call for each message."""
    if "early" in websocket.query_params:
        await runner.run(abs, -3)
    await websocket.accept()
    with contextlib.suppress(WebSocketDisconnect):
        while text := await websocket.receive_text():
            await websocket.send_json(await runner.run(abs, int(text)))


@pytest.fixture
def runner() -> Iterator[InferenceRunner[None]]:
    """A runner with room for one, which is stopped in the end."""
    with InferenceRunner[None](max_queue=1) as runner:
        yield runner


def application(runner: InferenceRunner[Any], **options: Any) -> FastAPI:
    """An application with the router above, and a mounted one with it as well."""
    app, mounted = FastAPI(**options), FastAPI()
    for each in (app, mounted):
        each.include_router(router)
    app.mount("/mounted", mounted)
    app.add_middleware(InferenceMiddleware, runner=runner)
    return app


def use_all(client: TestClient, prefix: str = "") -> None:
    """Make a call in every way there is."""
    assert client.get(f"{prefix}/awaited").json() == 1
    response = client.get(f"{prefix}/waited")
    assert response.json() == 2
    assert "infer;dur=" in response.headers.get("server-timing", "infer;dur=")
    with client.websocket_connect(f"{prefix}/ws") as websocket:
        websocket.send_text("-3")
        assert websocket.receive_json() == 3


# -- where the runner comes from ---------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/mounted"])
def test_middleware(prefix: str) -> None:
    """``RunnerDep`` finds the middleware's runner in HTTP and WebSocket endpoints, mounted too."""
    runner = InferenceRunner[None]()
    with TestClient(application(runner)) as client:
        use_all(client, prefix)
        for path in ("awaited", "waited"):
            assert "server-timing" in client.get(f"{prefix}/{path}").headers
    assert runner.statistics().state == "closed"


def test_lifespan() -> None:
    """``FastAPI(lifespan=runner.lifespan)`` starts, provides and stops a runner."""
    runner = InferenceRunner[None]()
    app = FastAPI(lifespan=runner.lifespan)
    app.include_router(router)
    with TestClient(app) as client:
        use_all(client)
    assert runner.statistics().state == "closed"


def test_lifespans_of_routers() -> None:
    """``APIRouter(lifespan=runner.lifespan)`` does so too, for several routers at once."""
    runners = [InferenceRunner[None](name=name) for name in ("ocr", "digits")]
    app = FastAPI()
    for number, runner in enumerate(runners):
        own = APIRouter(lifespan=runner.lifespan, prefix=f"/{number}")
        dependency = Depends(named(runner.name))

        @own.get("/name")
        async def name(runner: Any = dependency) -> str:
            return str(await runner.run(str.upper, runner.name))

        app.include_router(own)
    with TestClient(app) as client:
        assert [client.get(f"/{number}/name").json() for number in (0, 1)] == ["OCR", "DIGITS"]
    assert {runner.statistics().state for runner in runners} == {"closed"}


def test_router_s_lifespan_with_the_application_s() -> None:
    """A router's runner lives beside what the application's own lifespan keeps."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        yield {"own": 5}

    runner = InferenceRunner[None]()
    app = FastAPI(lifespan=lifespan)
    own = APIRouter(lifespan=runner.lifespan)

    @own.get("/")
    async def both(request: Request, runner: RunnerDep) -> list[int]:
        return [request.state.own, await runner.run(abs, -6)]

    app.include_router(own)
    with TestClient(app) as client:
        assert client.get("/").json() == [5, 6]


def test_refusal_in_a_router_with_lifespan(gate: Gate) -> None:
    """Overload behind a router's own lifespan is 503 with ``Retry-After``, as anywhere."""
    runner = InferenceRunner[None](max_queue=1)
    app = FastAPI()
    own = APIRouter(lifespan=runner.lifespan)
    own.include_router(router)
    app.include_router(own)
    with TestClient(app) as client:
        overload(runner, gate)
        assert_refused(client)
        gate.release.set()


def test_no_runner(caplog: pytest.LogCaptureFixture) -> None:
    """Without middleware or lifespan: 503, ``NotReady`` in the log with the cause and the fix."""
    app = FastAPI(lifespan=InferenceRunner[None]().lifespan)
    mounted = FastAPI()
    mounted.include_router(router)
    app.include_router(router)
    app.mount("/mounted", mounted)
    client = TestClient(app)
    for path in ("/awaited", "/mounted/waited"):
        assert client.get(path).status_code == 503
        assert client.get(path).json() == {"detail": "The service is not ready. Try again later."}
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/ws"):
        raise AssertionError
    assert denied.value.status_code == 503
    assert "with TestClient(app)" in caplog.text


def test_mounted_application_with_the_lifespan_of_the_outer_one() -> None:
    """A mounted application shares the state, and so the runner, of the outer one's lifespan."""
    runner = InferenceRunner[None]()
    app, mounted = FastAPI(lifespan=runner.lifespan), FastAPI()
    mounted.include_router(router)
    app.mount("/mounted", mounted)
    with TestClient(app) as client:
        use_all(client, "/mounted")


def test_bare_client(runner: InferenceRunner[None]) -> None:
    """Under a bare test client, which runs no lifespan, the middleware's runner starts lazily."""
    client = TestClient(application(runner))
    use_all(client)
    use_all(client, "/mounted")


# -- names and overrides -----------------------------------------------------------------------


def test_named() -> None:
    """``named`` gives one of several runners, and one and the same function for one name."""
    assert named("ocr") is named("ocr")
    assert named("ocr") is not named("digits")
    app = FastAPI()
    runners = [InferenceRunner[None](name=name) for name in ("ocr", "digits")]
    app.add_middleware(InferenceMiddleware, runner=runners)

    @app.get("/")
    async def name(ocr: OcrDep) -> str:
        return ocr.name

    @app.get("/any")
    async def ambiguous(runner: RunnerDep) -> str:
        return runner.name

    with TestClient(app) as client:
        assert client.get("/").json() == "ocr"
        assert client.get("/any").status_code == 503


class Fake:
    """What a test puts in a runner's place."""

    name = "fake"

    async def run(self, func: Any, *args: Any) -> int:
        """Return what the model would not."""
        return -1


def test_dependency_overrides() -> None:
    """Tests replace the runner, named or not, and then need none."""
    app = FastAPI()
    app.include_router(router)

    @app.get("/named")
    async def by_name(runner: OcrDep) -> int:
        return await runner.run(abs, -5)

    app.dependency_overrides[get_runner] = Fake
    app.dependency_overrides[named("ocr")] = Fake
    client = TestClient(app)
    assert client.get("/awaited").json() == -1
    assert client.get("/named").json() == -1
    with client.websocket_connect("/ws") as websocket:
        websocket.send_text("-3")
        assert websocket.receive_json() == -1


def test_openapi() -> None:
    """The dependency adds no parameters to the documentation."""
    schema = application(InferenceRunner[None]()).openapi()
    assert "parameters" not in schema["paths"]["/awaited"]["get"]


# -- refusals ----------------------------------------------------------------------------------


def overload(runner: InferenceRunner[Any], gate: Gate) -> None:
    """Fill the runner, so that it refuses the next call."""
    runner.submit(gate, 1)
    gate.wait_entered()
    runner.submit(gate, 1)


def assert_refused(client: TestClient, prefix: str = "") -> None:
    """Overload is 503 with ``Retry-After``, before any WebSocket is accepted as well."""
    for path in ("awaited", "waited"):
        response = client.get(f"{prefix}/{path}")
        assert response.status_code == 503
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.json() == {"detail": "The service is overloaded. Try again later."}
    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        client.websocket_connect(f"{prefix}/ws?early=1"),
    ):
        raise AssertionError
    assert denied.value.status_code == 503


@pytest.mark.parametrize("prefix", ["", "/mounted"])
def test_refusals(runner: InferenceRunner[None], gate: Gate, prefix: str) -> None:
    """So it is in FastAPI's endpoints, ``def`` ones and mounted ones included."""
    client = TestClient(application(runner))
    overload(runner, gate)
    assert_refused(client, prefix)
    with client.websocket_connect(f"{prefix}/ws") as websocket:
        websocket.send_text("1")
        with pytest.raises(WebSocketDisconnect) as closed:
            websocket.receive_json()
        assert closed.value.code == 1013


# -- responses ---------------------------------------------------------------------------------


def test_background_tasks() -> None:
    """Background tasks run after the response, with calls of their own, and are not dropped."""
    done: list[int] = []
    runner = InferenceRunner[None]()
    app = FastAPI()
    app.add_middleware(InferenceMiddleware, runner=runner)

    async def later(number: int) -> None:
        done.append(await runner.run(abs, -number))

    def later_in_a_thread(number: int) -> None:
        done.append(runner.submit(abs, -number).result(LIMIT))

    @app.get("/")
    async def answer(tasks: BackgroundTasks) -> int:
        for number in range(3):
            tasks.add_task(later, 10 + number)
            tasks.add_task(later_in_a_thread, 20 + number)
        return await runner.run(abs, -1)

    with TestClient(app) as client:
        assert client.get("/").json() == 1
    assert done == [10, 20, 11, 21, 12, 22]
    assert runner.statistics().cancelled == 0


def test_streaming_response() -> None:
    """A stream after a call reaches the client whole, whichever way it makes its calls."""
    app = FastAPI()
    app.add_middleware(InferenceMiddleware, runner=InferenceRunner[None]())

    @app.get("/async")
    async def stream(runner: RunnerDep) -> StreamingResponse:
        async def numbers() -> AsyncIterator[str]:
            for number in range(20):
                yield f"{await runner.run(abs, -number)},"

        await runner.run(abs, -1)
        return StreamingResponse(numbers())

    @app.get("/sync")
    def stream_from_a_thread(runner: RunnerDep) -> StreamingResponse:
        return StreamingResponse(f"{n}," for n in runner.map(abs, range(0, -20, -1)))

    with TestClient(app) as client:
        for path in ("/async", "/sync"):
            assert client.get(path).text == "".join(f"{number}," for number in range(20))


def test_upload() -> None:
    """FastAPI's own reading of a body does not mind a call before it, in a dependency."""
    app = FastAPI()
    app.add_middleware(InferenceMiddleware, runner=InferenceRunner[None]())

    async def permitted(runner: RunnerDep) -> bool:
        return await runner.run(bool, 1)

    @app.post("/", dependencies=[Depends(permitted)])
    async def size(content: Annotated[bytes, File()], runner: RunnerDep) -> int:
        return await runner.run(len, content)

    with TestClient(app) as client:
        assert client.post("/", files={"content": b"x" * 2_000_000}).json() == 2_000_000


def test_wrapped_function_as_endpoint() -> None:
    """A wrapped function is an endpoint, and a dependency, with the parameters it had."""
    runner = InferenceRunner[None]()
    app = FastAPI()
    app.add_middleware(InferenceMiddleware, runner=runner)

    def scale(x: int, factor: int = 2) -> str:
        return f"{x * factor} on {threading.current_thread().name}"

    app.get("/endpoint")(runner.wrap(scale))

    @app.get("/dependency")
    async def dependency(scaled: str = Depends(runner.wrap(scale))) -> str:
        return scaled

    with TestClient(app) as client:
        assert client.get("/endpoint?x=3").json() == "6 on inference"
        assert client.get("/dependency?x=3&factor=3").json() == "9 on inference"
        assert client.get("/endpoint").status_code == 422


def test_without_fastapi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FastAPI is not installed, the import says how to install it."""
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "asgi_infer.fastapi")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'asgi-infer\[fastapi\]'"):
        importlib.import_module("asgi_infer.fastapi")
