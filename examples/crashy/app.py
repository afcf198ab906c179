"""The web application: a page that crashes the model, and goes on, since it lives elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel

from asgi_infer import InferenceMiddleware, InferenceRunner, NativePolicy, WorkerCrashed
from asgi_infer.workers import ProcessWorker, RestartPolicy

from .model import Elements

runner = InferenceRunner(
    Elements,
    warmup=Elements.warm_up,
    name="crashy",
    native=NativePolicy(threads=1),
    # The fourth crash in ten seconds is one too many: two seconds of 503, and another try.
    # Made for watching: the defaults bear five a minute, and take half a minute off.
    worker=ProcessWorker(restart=RestartPolicy(max_restarts=3, within=10.0, recover_after=2.0)),
)

app = FastAPI(title="Crashy")
app.add_middleware(InferenceMiddleware, runner=runner)


class Found(BaseModel):
    """An element, and the process that has looked it up."""

    number: int
    name: str
    process: int


@app.get("/elements/{number}")
async def element(number: Annotated[int, InPath(ge=0, lt=2**53)]) -> Found:
    """The element of that number. Where there is none, the model crashes: a 500, for this call."""
    found = await runner.run(runner.model.find, number)
    return Found(**asdict(found))


class Health(BaseModel):
    """The state of the service."""

    status: str
    runner: dict[str, Any]


@app.get("/health")
async def health() -> Health:
    """Answer at once, whatever the model is doing, and also when there is none."""
    statistics = runner.statistics()
    return Health(status=statistics.state, runner=asdict(statistics))


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page with the buttons."""
    return FileResponse(Path(__file__).with_name("page.html"))


@app.exception_handler(WorkerCrashed)
async def tell(request: Request, error: WorkerCrashed) -> JSONResponse:
    """Say how the model died, and where.

    Not for clients at large, who get "Internal Server Error" without this: but here is one who
    wants to know.
    """
    del request
    notes = "\n".join(getattr(error, "__notes__", []))
    return JSONResponse({"detail": str(error), "notes": notes}, status_code=error.status_code)


@app.exception_handler(RequestValidationError)
async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong with a request, in the words of the first error."""
    del request
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return JSONResponse({"detail": f"{place}: {first['msg']}"}, status_code=422)
