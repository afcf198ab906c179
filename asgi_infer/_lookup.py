"""From a connection to the runner that serves it."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from ._errors import NotReady
from ._runner import STATE_KEY, InferenceRunner

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

logger = logging.getLogger("asgi_infer")


def runner_from(connection: HTTPConnection, name: str | None = None) -> InferenceRunner[Any]:
    """The runner that ``InferenceMiddleware`` or ``runner.lifespan`` provides.

    :param connection: a request or a WebSocket
    :param name: which one; may be left out where there is only one
    :raises NotReady: there is none, or none of that name, or several to choose from. Its text,
        which is logged as well, names the cause and the fix; the client gets a bare 503
    """
    runners = _provided(connection.scope)
    if name is None and len(runners) == 1:
        return next(iter(runners.values()))
    if name is not None and name in runners:
        return runners[name]
    error = NotReady(_explain(name, sorted(runners)))
    logger.error("%s", error)
    raise error


def _provided(scope: MutableMapping[str, Any]) -> dict[str, InferenceRunner[Any]]:
    state = scope.get("state", {})
    runners = dict(state.get(STATE_KEY, {}))
    # Where the lifespans of several routers are merged, one of them wins the key they share.
    prefix = f"{STATE_KEY}."
    for key, runner in state.items():
        if key.startswith(prefix):
            runners[key.removeprefix(prefix)] = runner
    return runners


def _explain(name: str | None, known: list[str]) -> str:
    if not known:
        return (
            "no runner was found: neither InferenceMiddleware nor the lifespan of a runner has "
            "run for this connection. Install one on the outermost application, with "
            "app.add_middleware(InferenceMiddleware, runner=runner) or "
            "FastAPI(lifespan=runner.lifespan). With the latter, a mounted application gets no "
            "lifespan of its own, and in a test 'with TestClient(app)' runs it where a bare "
            "'TestClient(app)' does not"
        )
    if name is None:
        return f"there are several runners, {', '.join(known)}: say which one by its name"
    return f"there is no runner named {name!r} here, only {', '.join(known)}"
