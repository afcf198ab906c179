"""Real servers with several processes, and one model for all of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from ..polling import until_true
from ..test_servers import LIMIT, ROOT, free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="locks and sockets as on Linux")

APP = "tests.workers.shared_app:app"
COMMANDS = {
    "uvicorn": "uvicorn {app} --port {port} --workers {workers} --timeout-graceful-shutdown 1",
    "gunicorn": (
        "gunicorn {app} --bind 127.0.0.1:{port} --workers {workers} --worker-class "
        "uvicorn_worker.UvicornWorker --graceful-timeout 2 --no-control-socket"
    ),
    "granian": "granian {app} --port {port} --workers {workers} --interface asgi --respawn-failed-workers",
}


class Deployment:
    """A server with several processes."""

    def __init__(self, kind: str, directory: Path, workers: int = 3) -> None:
        self.directory = directory
        self.meeting = directory / "meeting"
        self.port = free_port()
        self.name = f"shared-{self.port}"  # at the end of the model process's command line
        command = COMMANDS[kind].format(app=APP, port=self.port, workers=workers)
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command.split()],
                cwd=ROOT,
                env={
                    **os.environ,
                    "MEETING": str(self.meeting),
                    "NAME": self.name,
                    "TMPDIR": str(directory),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def get(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, body
            return json.loads(body)
        finally:
            connection.close()

    def seen(self) -> tuple[set[int], set[int]]:
        """The servers that answer now, and the model processes that do."""
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: self.try_pids(), range(24)))
        found = [answer for answer in answers if answer]
        return {server for server, _ in found}, {model for _, model in found}

    def try_pids(self) -> Any:
        with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
            return self.get("/pids")

    def wait_for(self, servers: int) -> tuple[set[int], int]:
        """Wait until so many servers have answered; return them, and the one model process."""
        found: set[int] = set()

        def enough() -> bool:
            assert self.process.poll() is None, self.log
            found.update(self.seen()[0])
            return len(found) >= servers

        until_true(enough, 2 * LIMIT, step=0.02)
        _, models = self.seen()
        assert len(models) == 1, self.log
        return found, models.pop()

    def model_processes(self) -> int:
        """How many there are."""
        count = 0
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.cmdline()[-1:] == [self.name] and process.status() != "zombie":
                    count += 1
        return count

    @property
    def starts(self) -> int:
        """How many model processes there have been."""
        return Path(f"{self.meeting}.started").stat().st_size

    def hold(self, pool: ThreadPoolExecutor, name: str) -> Future[Any]:
        """Have a call run until ``release`` is called with the name."""
        path = str(self.directory / name)
        future = pool.submit(self.get, f"/hold?path={path}")
        until_true(lambda: Path(path + ".held").exists(), LIMIT, step=0.002)
        return future

    def release(self, name: str) -> None:
        (self.directory / name).touch()

    def stop(self) -> None:
        """End it as a supervisor does, and check that nothing is left."""
        self.process.terminate()
        self.process.wait(LIMIT)
        until_true(lambda: not self.model_processes(), LIMIT, step=0.02)
        self.check_clean()

    def check_clean(self) -> None:
        (base,) = self.directory.glob("asgi_infer-*")
        assert list(base.iterdir()) == []
        assert not Path(f"{self.meeting}.two").exists()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LIMIT)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Of a short path, for the socket's must be short."""
    with tempfile.TemporaryDirectory(prefix="shared-") as path:
        yield Path(path)


@pytest.fixture(params=["uvicorn", "gunicorn"])
def deployment(request: pytest.FixtureRequest, directory: Path) -> Iterator[Deployment]:
    server = Deployment(request.param, directory)
    yield server
    server.kill()


def test_one_model_for_all(deployment: Deployment) -> None:
    """Three server processes have one model process. It outlives the death of any of them; its own
    takes one call, and the next server to notice starts it again. With the last server it ends,
    and leaves no files."""
    servers, model = deployment.wait_for(3)
    assert deployment.model_processes() == deployment.starts == 1

    os.kill(min(servers), signal.SIGKILL)
    assert deployment.wait_for(2)[1] == model
    assert deployment.model_processes() == deployment.starts == 1

    with ThreadPoolExecutor(1) as pool:
        running = deployment.hold(pool, "call")
        os.kill(model, signal.SIGKILL)
        with pytest.raises(AssertionError, match="Internal Server Error"):
            running.result(LIMIT)
    assert deployment.wait_for(2)[1] != model
    assert deployment.model_processes() == 1
    assert deployment.starts == 2
    deployment.stop()


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", list(COMMANDS))
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random(kind: str, seed: int, directory: Path) -> None:
    """Servers and the model process are killed at any time, under load: there is never a second
    model process, whoever is left serves, and in the end nothing is left."""
    deployment = Deployment(kind, directory)
    chance = random.Random(seed)
    try:
        _, model = deployment.wait_for(3)
        with ThreadPoolExecutor(4) as pool:
            end = time.monotonic() + 20
            load = [pool.submit(ask_until, deployment, end) for _ in range(4)]
            while time.monotonic() < end - 5:
                time.sleep(chance.random())
                servers, models = deployment.seen()
                victims = [*models, *(servers if chance.random() < 0.3 else ())]
                if victims:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(victims), signal.SIGKILL)
                assert deployment.model_processes() <= 1
            assert min(each.result() for each in load) > 0
        assert deployment.wait_for(1)[1] != model
        deployment.stop()
    finally:
        deployment.kill()


def ask_until(deployment: Deployment, end: float) -> int:
    """How many requests were answered."""
    count = 0
    while time.monotonic() < end:
        count += deployment.try_pids() is not None
    return count
