"""Real servers in processes of their own, real sockets, real signals."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from .polling import until_true

pytestmark = [
    pytest.mark.unmeasured,
    pytest.mark.skipif(sys.platform == "win32", reason="signals and descriptors"),
]

ROOT = Path(__file__).parent.parent

LIMIT = 20.0
"""Seconds after which what should happen at once, in a process that starts, counts as hung."""

EXIT_GRACE = 0.2
"""Seconds that a call which never returns holds up the end, in the place of one: see test_exit."""

OPTIONS = {
    "uvicorn": "--timeout-graceful-shutdown 1",
    "hypercorn": "--graceful-timeout 1 --backlog 1000",
}
COMMANDS = {
    "uvicorn": "uvicorn {app} --port {port} --loop asyncio {uvicorn}",
    "uvicorn+uvloop": "uvicorn {app} --port {port} --loop uvloop {uvicorn}",
    "hypercorn": "hypercorn {app} --bind 127.0.0.1:{port} --workers 0 {hypercorn}",
    "hypercorn+trio": "hypercorn {app} --bind 127.0.0.1:{port} -k trio {hypercorn}",
    "granian": "granian {app} --port {port} --interface asgi",
}
ONE_OF_EACH = ["uvicorn", "hypercorn", "hypercorn+trio", "granian"]


class Server:
    """A server in a process of its own, with one of the applications of ``server_apps``."""

    def __init__(self, kind: str, log: Path, app: str = "app", grace: float = 5.0) -> None:
        self.kind = kind
        self.log = log
        self.port = free_port()
        app = f"tests.server_apps:{app}"
        command = COMMANDS[kind].format(app=app, port=self.port, **OPTIONS)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command.split()],
                cwd=ROOT,
                env={**os.environ, "GRACE": str(grace), "EXIT_GRACE": str(EXIT_GRACE)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> Server:
        """Wait until it answers."""

        def answers() -> bool:
            assert self.process.poll() is None, self.output
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.get("/").status > 0
            return False

        until_true(answers, LIMIT, step=0.02)
        return self

    @property
    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text()

    def get(self, path: str) -> Answer:
        """Send a request, and read the answer."""
        return self.request("GET", path)

    def request(self, method: str, path: str, body: Any = None) -> Answer:
        """Send a request, and read the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        try:
            connection.request(method, path, body, encode_chunked=body is not None)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def connection(self, path: str) -> socket.socket:
        """A socket over which a request has been sent."""
        sock = socket.create_connection(("127.0.0.1", self.port), LIMIT)
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        return sock

    def websocket(self, path: str) -> ClientConnection:
        """A WebSocket, open within a ``with`` block."""
        uri = f"ws://127.0.0.1:{self.port}{path}"
        return connect(uri, open_timeout=LIMIT, close_timeout=1, compression=None)

    def stats(self) -> dict[str, Any]:
        """The runner's statistics."""
        return dict(self.get("/stats").json)

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the runner's statistics are so."""
        until_true(lambda: condition(self.stats()), LIMIT, step=0.02)

    def release(self) -> list[str]:
        """Let all calls end, and return which have run since the last time."""
        return list(self.get("/release").json)

    def terminate(self) -> float:
        """Ask it to end, and return when that was."""
        self.process.terminate()
        return time.monotonic()

    def wait(self) -> int:
        """Wait for its end, and return its exit code."""
        return self.process.wait(LIMIT)

    def kill(self) -> None:
        """End it and what it has started, whatever state they are in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LIMIT)


class Answer:
    """What a server answered."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body

    @property
    def json(self) -> Any:
        assert self.status == 200, (self.status, self.body)
        return json.loads(self.body)


def free_port() -> int:
    """A port that the system says is free."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module", params=COMMANDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One server of each kind for all tests that leave it as it was, and one that ends it."""
    server = Server(request.param, tmp_path_factory.mktemp("server") / "log")
    try:
        yield server.wait_ready()
    finally:
        server.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of the test's own."""
    servers: list[Server] = []

    def start(kind: str, **options: Any) -> Server:
        servers.append(Server(kind, tmp_path / f"log{len(servers)}", **options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


# -- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/base"])
def test_streamed_answer(server: Server, prefix: str) -> None:
    """A stream of calls arrives whole, also through a ``BaseHTTPMiddleware`` inside ours."""
    answer = server.get(f"{prefix}/stream")
    assert answer.body.decode() == "".join(f"{number}," for number in range(50))
    assert answer.headers["server-timing"].startswith("queue;dur=")


@pytest.mark.parametrize("prefix", ["", "/base"])
def test_upload(server: Server, prefix: str) -> None:
    """A body of two megabytes in many chunks arrives whole, read before and between calls."""
    chunks = [bytes([number]) * 100_000 for number in range(20)]
    answer = server.request("POST", f"{prefix}/upload", iter(chunks))
    assert answer.json == hashlib.sha256(b"".join(chunks)).hexdigest()


def test_server_timing(server: Server) -> None:
    """``Server-Timing`` says how long the call waited and ran, in milliseconds."""
    answer = server.get("/sleep?seconds=0.1")
    queue, infer = answer.headers["server-timing"].split(", ")
    assert 0 <= float(queue.removeprefix("queue;dur=")) < 1000 * LIMIT
    assert 100 <= float(infer.removeprefix("infer;dur=")) < 1000 * LIMIT


def test_websocket_messages(server: Server) -> None:
    """Messages sent while calls run are answered, every one and in order."""
    with server.websocket("/ws") as websocket:
        for number in range(50):
            websocket.send(f"text {number}")
        answers = [websocket.recv(LIMIT) for _ in range(50)]
    assert answers == [f"TEXT {number}" for number in range(50)]


def test_refusals(server: Server) -> None:
    """Overload is 503 with ``Retry-After``, and to an open WebSocket: try again later (1013)."""
    assert server.get("/fill").json == "full"
    for prefix in ("", "/base"):
        answer = server.get(f"{prefix}/refused")
        assert answer.status == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    with server.websocket("/ws") as websocket:
        websocket.send("full")
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(LIMIT)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1013
    server.release()


def test_websocket_denial(server: Server) -> None:
    """A WebSocket for which there is no room is denied with 503 and ``Retry-After``."""
    assert server.get("/fill").json == "full"
    with pytest.raises(InvalidStatus) as denied, server.websocket("/ws?full=1"):
        raise AssertionError
    assert denied.value.response.status_code == 503
    assert 1 <= int(denied.value.response.headers["retry-after"]) <= 60
    server.release()


# -- clients that hang up ----------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/base"])
def test_five_hundred_clients_hang_up(server: Server, prefix: str) -> None:
    """Of clients that hang up while they wait, no call runs: only the one that had started."""
    before = server.stats()
    with contextlib.ExitStack() as stack:
        stack.enter_context(server.connection(f"{prefix}/hold?token=first"))
        server.until(lambda now: now["running"] == 1)
        for number in range(500):
            stack.enter_context(server.connection(f"{prefix}/hold?token={number}"))
        server.until(lambda now: now["queued"] == 500)
    server.until(lambda now: now["queued"] == 0)
    after = server.stats()
    assert after["cancelled"] + after["late"] >= before["cancelled"] + 500
    assert server.release() == ["first"]
    assert server.stats()["cancelled"] == before["cancelled"] + 501


def test_fifty_websockets_hang_up(server: Server) -> None:
    """The same for clients that hang up their WebSocket."""
    before = server.stats()
    with contextlib.ExitStack() as stack:
        websockets = [stack.enter_context(server.websocket("/ws")) for _ in range(51)]
        websockets[0].send("hold first")
        server.until(lambda now: now["running"] == 1)
        for number, websocket in enumerate(websockets[1:]):
            websocket.send(f"hold {number}")
        server.until(lambda now: now["queued"] == 50)
        for websocket in websockets:
            websocket.close_socket()  # without a closing handshake
    server.until(lambda now: now["queued"] == 0)
    assert server.release() == ["hold first"]
    assert server.stats()["cancelled"] == before["cancelled"] + 51


@pytest.mark.parametrize("path", ["/endless", "/endless?interleave=1", "/base/endless"])
def test_client_hangs_up_in_a_stream(server: Server, path: str) -> None:
    """A client that hangs up in the middle has the generator closed on its thread, which is free.

    It has read a part, and the rest stands: in the server's buffers, and in the stream's.
    """
    before = server.stats()
    with server.connection(path) as sock, sock.makefile("rb") as response:
        lines = iter(response.readline, b"")
        assert next(lines).split()[1] == b"200"
        assert b"more\n" in lines
        server.until(lambda now: now["running"] == 1)
    server.until(lambda now: now["running"] == 0)
    assert server.release() == ["closed on the same thread"]
    after = server.stats()
    assert after["cancelled"] == before["cancelled"] + 1
    assert after["late"] == before["late"] + 1


def test_background_calls_are_not_dropped(server: Server) -> None:
    """A client that hangs up after its response takes no background call with it."""
    before = server.stats()
    assert server.get("/hold-in-background").json == "accepted"
    server.until(lambda now: now["running"] == 1)
    assert server.get("/hold-in-background").json == "accepted"
    server.until(lambda now: now["queued"] == 1)
    assert server.release() == ["late", "late"]
    assert server.stats()["completed"] == before["completed"] + 2
    assert server.stats()["cancelled"] == before["cancelled"]


# -- the end -----------------------------------------------------------------------------------


def test_sigterm_with_work_queued(server: Server) -> None:
    """On SIGTERM, accepted work finishes and is answered, and then the process ends. So this is
    the last test of each server."""
    printed = len(server.output)
    with ThreadPoolExecutor(5) as clients:
        answers = [clients.submit(server.get, "/sleep?seconds=0.15") for _ in range(4)]
        server.until(lambda now: now["queued"] == 3)
        server.terminate()
        assert [answer.result(LIMIT).status for answer in answers] == [200] * 4
    assert server.wait() in (0, -signal.SIGTERM)
    assert "Error" not in server.output[printed:]
    with pytest.raises(ConnectionRefusedError):
        server.get("/stats")


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_sigterm_with_a_call_that_never_returns(start: Callable[..., Server], kind: str) -> None:
    """A call that never returns holds up the end of the process by the server's grace, and by
    that of any program."""
    server = start(kind, grace=0.2).wait_ready()
    assert server.get("/stuck").json == "accepted"
    server.until(lambda now: now["running"] == 1)
    since = server.terminate()
    assert server.wait() in (0, -signal.SIGTERM)
    assert time.monotonic() - since < 0.2 + EXIT_GRACE + 3  # three to end on a busy machine
    assert "the runner 'inference' stopped while Event.wait was running" in server.output
    assert "Fatal Python error" not in server.output


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn", "hypercorn+trio"])
def test_sigterm_with_requests_that_never_end(start: Callable[..., Server], kind: str) -> None:
    """So does one that requests wait for, from when the server has given up on those."""
    server = start(kind, grace=0.2).wait_ready()
    with contextlib.ExitStack() as stack:
        for token in "abc":
            stack.enter_context(server.connection(f"/hold?token={token}"))
        server.until(lambda now: now["queued"] == 2)
        server.terminate()
        assert server.wait() in (0, -signal.SIGTERM)
    assert "Fatal Python error" not in server.output


# -- models that don't load --------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMMANDS)
def test_load_failure(start: Callable[..., Server], kind: str) -> None:
    """A model that does not load ends the server, with the cause in one line."""
    server = start(kind, app="broken")
    code = server.wait()
    assert code == 3 or not kind.startswith("uvicorn")  # the others have no code for it
    cause = "the runner 'inference' did not start: OSError: no weights in sight"
    assert cause in server.output.splitlines()


def test_startup_timeout(start: Callable[..., Server]) -> None:
    """So does one that takes too long, though its thread can't be ended."""
    server = start("uvicorn", app="slow")
    assert server.wait() == 3
    assert "did not start: NotReady: the model of 'inference' did not load in 0.1 s" in (
        server.output
    )
    assert "Fatal Python error" not in server.output


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_bare_application(start: Callable[..., Server], kind: str) -> None:
    """An application without a framework and without lifespan starts, answers and ends."""
    server = start(kind, app="bare").wait_ready()
    assert server.get("/").json == 7
    server.terminate()
    assert server.wait() in (0, -signal.SIGTERM)
