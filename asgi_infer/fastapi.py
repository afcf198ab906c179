"""Dependencies for FastAPI: ``RunnerDep``, and ``named`` where there are several runners.

::

    @app.post("/predict")
    async def predict(image: Image, runner: RunnerDep) -> int:
        return await runner.run(runner.model.predict, image.array())

They work in HTTP and WebSocket endpoints, in routers and mounted applications, and can be
replaced in tests: ``app.dependency_overrides[get_runner] = lambda: fake``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from typing import Annotated, Any

from starlette.requests import HTTPConnection

try:
    from fastapi import Depends
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "asgi_infer.fastapi needs FastAPI: pip install 'asgi-infer[fastapi]'", name=error.name
    ) from None

from ._lookup import runner_from
from ._runner import InferenceRunner

__all__ = ["RunnerDep", "get_runner", "named"]


async def get_runner(connection: HTTPConnection) -> InferenceRunner[Any]:
    """The application's only runner.

    :raises NotReady: there is none, or there are several; see ``runner_from``
    """
    return runner_from(connection)


RunnerDep = Annotated[InferenceRunner[Any], Depends(get_runner)]
"""The application's only runner, as a parameter of an endpoint."""


@cache  # the same name gives the same function, so that dependency_overrides finds it
def named(name: str) -> Callable[[HTTPConnection], Awaitable[InferenceRunner[Any]]]:
    """The dependency on the runner of that name: ``Annotated[..., Depends(named("ocr"))]``."""

    async def get_named_runner(connection: HTTPConnection) -> InferenceRunner[Any]:
        return runner_from(connection, name)

    return get_named_runner
