"""A large model behind ``uvicorn --workers``: one for each server process, or one for all."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI

from asgi_infer import InferenceRunner
from asgi_infer.workers import ThreadWorker
from asgi_infer.workers._protocol import Worker

from ._models import Ballast

FOLDER = "BENCH_FOLDER"
"""The environment variable that says where each server makes a file once it is up.

All processes of a server inherit it, and are known by that.
"""
MEBIBYTES = "BENCH_MEBIBYTES"
WORKER = "BENCH_WORKER"

_folder = Path(os.environ[FOLDER])


def _worker() -> Worker:
    if os.environ[WORKER] == "ThreadWorker":
        return ThreadWorker()
    from asgi_infer.workers import SharedWorker  # whose modules the other arm does without

    return SharedWorker(_folder / "model")


runner = InferenceRunner(partial(Ballast, int(os.environ[MEBIBYTES])), worker=_worker())


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with runner:
        await runner.run(runner.model.predict)
        (_folder / f"{os.getpid()}.up").touch()
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/predict")
async def predict() -> int:
    return await runner.run(runner.model.predict)
