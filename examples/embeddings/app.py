"""The web application: a search box, an endpoint for vectors, and the model behind them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_infer import Batcher, InferenceMiddleware, InferenceRunner, NativePolicy

from .model import BEST, PassageSearch

MAX_LENGTH = 1000  # characters of a text
MAX_BYTES = 2**15  # of a request: enough for as many characters, each escaped as two \uXXXX

runner = InferenceRunner(
    PassageSearch,
    warmup=lambda model: model.search(["how do I read a file?"]),
    name="embeddings",
    # A batch is a millisecond of work: what more threads would save, their barriers would cost.
    native=NativePolicy(threads=1),
)

# Texts that arrive while the model is busy are its next batch. Nobody waits for a batch to fill.
embeddings = Batcher(runner, runner.model.embed, max_size=64)
searches = Batcher(runner, runner.model.search, max_size=64)


def _usable(text: str) -> str:
    text = text.strip()
    if not text:
        raise PydanticCustomError("empty", "the text is empty: send at least one word")
    if len(text) > MAX_LENGTH:
        length = {"length": len(text), "most": MAX_LENGTH}
        raise PydanticCustomError(
            "long", "the text has {length} characters, {most} at most", length
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("half", "half a surrogate pair is no character")
    return text


Text = Annotated[
    str,
    AfterValidator(_usable),
    Field(strict=True, json_schema_extra={"minLength": 1, "maxLength": MAX_LENGTH}),
]


class Embed(BaseModel):
    """A text to turn into a vector."""

    text: Text


class Embedding(BaseModel):
    """The vector of a text: its direction is the meaning, its length is 1."""

    vector: list[float]


class Result(BaseModel):
    """A passage of the manual, and how near it is in meaning: 1 is the same, 0 is unrelated."""

    title: str
    text: str
    similarity: float


class Results(BaseModel):
    """The best passages, and how many queries the model answered in the same call."""

    results: list[Result]
    batch: int


class Health(BaseModel):
    """The state of the service."""

    status: str
    runner: dict[str, Any]


class BodyLimit:
    """Refuses requests that grow too large while they arrive, before they fill the memory."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, f"the request has more than {self._max_bytes} bytes")
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)


app = FastAPI(title="Embeddings")
app.add_middleware(BodyLimit, max_bytes=MAX_BYTES)
app.add_middleware(InferenceMiddleware, runner=runner)


@app.post("/embed")
async def embed(body: Embed) -> Embedding:
    """The vector of a text. Texts of other requests may share its call of the model."""
    vector = await embeddings.run(body.text)
    return Embedding(vector=vector.tolist())


@app.get("/search")
async def search(q: Text, limit: Annotated[int, Query(ge=1, le=BEST)] = 8) -> Results:
    """The passages of the Python manual that are nearest in meaning."""
    found = await searches.run(q)
    results = [
        Result(title=hit.passage.title, text=hit.passage.text, similarity=hit.similarity)
        for hit in found.hits[:limit]
    ]
    return Results(results=results, batch=found.batch)


@app.get("/health")
async def health() -> Health:
    """Answer at once, whatever the model is doing."""
    statistics = runner.statistics()
    return Health(status=statistics.state, runner=asdict(statistics))


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page with the search box."""
    return FileResponse(Path(__file__).with_name("page.html"))


@app.exception_handler(RequestValidationError)
async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong with a request, in the words of the first error."""
    del request
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return JSONResponse({"detail": f"{place}: {first['msg']}"}, status_code=422)
