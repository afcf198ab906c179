"""From a connection to its runner, or to an explanation of why there is none."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import HTTPConnection, Request
from starlette.websockets import WebSocket

from asgi_infer import InferenceRunner, NotReady, runner_from

OCR = InferenceRunner[None](name="ocr")
DIGITS = InferenceRunner[None](name="digits")


def connection(**state: Any) -> HTTPConnection:
    """A request with that state."""
    return HTTPConnection({"type": "http", "state": state, "headers": []})


def test_the_only_runner() -> None:
    """Where there is one runner, it needs no name."""
    only = connection(asgi_infer={"ocr": OCR})
    assert runner_from(only) is OCR
    assert runner_from(only, "ocr") is OCR


def test_requests_and_websockets() -> None:
    """Requests and WebSockets are both connections."""

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    state = {"asgi_infer": {"ocr": OCR}}
    request = Request({"type": "http", "state": state})
    websocket = WebSocket({"type": "websocket", "state": state}, nothing, nothing)
    assert runner_from(request) is runner_from(websocket) is OCR


def test_one_of_several() -> None:
    """Among several runners, the name tells which."""
    several = connection(asgi_infer={"ocr": OCR, "digits": DIGITS})
    assert runner_from(several, "ocr") is OCR
    assert runner_from(several, "digits") is DIGITS


def test_merged_lifespans() -> None:
    """Runners whose lifespans were merged into one state are all found."""
    merged = connection(
        **{"asgi_infer": {"ocr": OCR}, "asgi_infer.ocr": OCR, "asgi_infer.digits": DIGITS}
    )
    assert runner_from(merged, "ocr") is OCR
    assert runner_from(merged, "digits") is DIGITS
    with pytest.raises(NotReady):
        runner_from(merged)


@pytest.mark.parametrize(
    ("state", "name", "messages"),
    [
        ({}, None, ["app.add_middleware(InferenceMiddleware, runner=runner)", "lifespan"]),
        ({}, "ocr", ["a mounted application gets no lifespan", "with TestClient(app)"]),
        ({"asgi_infer": {"ocr": OCR}}, "digits", ["no runner named 'digits' here, only ocr"]),
        (
            {"asgi_infer": {"ocr": OCR, "digits": DIGITS}},
            None,
            ["several runners, digits, ocr: say which one"],
        ),
    ],
)
def test_no_such_runner(
    state: dict[str, Any], name: str | None, messages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The error and the log name the cause and the fix; the client gets a bare 503."""
    with pytest.raises(NotReady) as caught:
        runner_from(connection(**state), name)
    assert all(message in str(caught.value) for message in messages)
    assert [record.message for record in caplog.records] == [str(caught.value)]
    assert caught.value.status_code == 503
    assert caught.value.detail == "The service is not ready. Try again later."


def test_no_state_at_all() -> None:
    """A server without lifespan state provides no runner."""
    with pytest.raises(NotReady, match="no runner was found"):
        runner_from(HTTPConnection({"type": "http", "headers": []}))
