"""The web application: a page that shows a text while it is written, and the model behind it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError

from asgi_infer import (
    ClientDisconnected,
    InferenceMiddleware,
    InferenceRunner,
    NativePolicy,
    Stream,
)

from .model import LanguageModel, pieces

MAX_LENGTH = 500  # characters of a prompt
MAX_WORDS = 2000

runner = InferenceRunner(
    LanguageModel,
    warmup=lambda model: model.shares("The with statement"),
    name="stream",
    native=NativePolicy(threads=1),  # a word is a few operations on 4,000 numbers
)

app = FastAPI(title="Stream")
app.add_middleware(InferenceMiddleware, runner=runner)


def _usable(prompt: str) -> str:
    if len(prompt) > MAX_LENGTH:
        length = {"length": len(prompt), "most": MAX_LENGTH}
        raise PydanticCustomError(
            "long", "the prompt has {length} characters, {most} at most", length
        )
    if not pieces(prompt):
        raise PydanticCustomError("empty", "the prompt is empty: begin with a word or two")
    return prompt


Prompt = Annotated[
    str,
    AfterValidator(_usable),
    Field(json_schema_extra={"minLength": 1, "maxLength": MAX_LENGTH}),
]


@app.get("/generate")
async def generate(
    prompt: Prompt,
    words: Annotated[int, Query(ge=1, le=MAX_WORDS)] = 200,
    seed: Annotated[int, Query(ge=0, lt=2**32)] = 0,
    temperature: Annotated[float, Query(ge=0.1, le=2)] = 0.6,
    cost: Annotated[float, Query(ge=0, le=1)] = 0,
) -> EventSourceResponse:
    """Write on from a prompt. Each event is a word or a mark; ``end`` is the last one.

    The same seed makes the same text. With ``cost``, each word takes that many seconds at
    least, as it does in larger models.
    """
    # Called here, so that a full queue is answered with a 503: in a generator of events, where
    # FastAPI would also take them from, the response has begun. Interleaved, several texts are
    # written in turn.
    stream = runner.stream(
        runner.model.generate, prompt, words, seed, temperature, cost, interleave=True
    )
    return EventSourceResponse(events(stream), headers={"Cache-Control": "no-cache"})


async def events(stream: Stream[str]) -> AsyncIterator[bytes]:
    """The words as Server-Sent Events."""
    try:
        async for piece in stream:
            yield format_sse_event(data_str=json.dumps(piece))
    except ClientDisconnected:
        return  # the generator is closed already, and nobody reads on
    yield format_sse_event(event="end", data_str="null")  # else a browser would connect again


class Text(BaseModel):
    """How a text came to its end."""

    number: int
    words: int
    wanted: int
    thread: str
    summary: str


@app.get("/texts")
async def texts() -> list[Text]:
    """How the latest texts ended, the last one first. Runs between the words of others."""
    ended = await runner.run(runner.model.ended)
    return [Text(**asdict(each), summary=str(each)) for each in ended]


class Health(BaseModel):
    """The state of the service."""

    status: str
    runner: dict[str, Any]


@app.get("/health")
async def health() -> Health:
    """Answer at once, whatever the model is doing."""
    statistics = runner.statistics()
    return Health(status=statistics.state, runner=asdict(statistics))


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page to watch."""
    return FileResponse(Path(__file__).with_name("page.html"))


@app.exception_handler(RequestValidationError)
async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong with a request, in the words of the first error."""
    del request
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return JSONResponse({"detail": f"{place}: {first['msg']}"}, status_code=422)
