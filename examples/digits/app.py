"""The web application: a page to draw on, and the model behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from asgi_infer import InferenceMiddleware, InferenceRunner, NativePolicy

from .model import Array, DigitReader, split_samples

_, HELD_OUT = split_samples()

# The class, not an instance: the runner makes that on its own thread, and training is part of it.
runner = InferenceRunner(
    DigitReader,
    warmup=lambda reader: reader.probabilities(HELD_OUT.pixels[0]),
    name="digits",
    # One image has work for one CPU: 300 trees of a few steps. Shared out, each of them would
    # end in a barrier that costs more than it. Leave this out where calls bring many images.
    native=NativePolicy(threads=1),
)


class State(TypedDict):
    """What the endpoints find in ``request.state``."""

    accuracy: float


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[State]:
    """Measure the model once. The middleware has started the runner by the time this runs."""
    del app
    yield {"accuracy": await runner.run(runner.model.accuracy, HELD_OUT)}


app = FastAPI(title="Digits", lifespan=lifespan)
app.add_middleware(InferenceMiddleware, runner=runner)


def _join_rows(pixels: Any) -> Any:
    if not isinstance(pixels, list) or not any(isinstance(row, list) for row in pixels):
        return pixels
    if len(pixels) != 8 or any(not isinstance(row, list) or len(row) != 8 for row in pixels):
        raise PydanticCustomError("rows", "rows must be 8 lists of 8 numbers")
    return [pixel for row in pixels for pixel in row]


Pixel = Annotated[float, Field(strict=True, ge=0, le=16, allow_inf_nan=False)]
Pixels = Annotated[
    list[Pixel],
    Field(min_length=64, max_length=64),
    BeforeValidator(_join_rows, json_schema_input_type=list[Pixel] | list[list[Pixel]]),
]


class Image(BaseModel):
    """One digit in 8 x 8 pixels, each from 0 (paper) to 16 (ink): 64 numbers, or 8 rows of 8."""

    pixels: Pixels

    def array(self) -> Array:
        """The pixels, row by row."""
        return np.array(self.pixels)


class Answer(BaseModel):
    """What the model reads in an image."""

    digit: int
    probabilities: list[float]


class Sample(BaseModel):
    """A digit that somebody wrote, and that the model has not seen."""

    pixels: list[int]
    label: int


class Health(BaseModel):
    """The state of the service."""

    status: str
    accuracy: float
    runner: dict[str, Any]


@app.post("/predict")
async def predict(image: Image) -> Answer:
    """Read a digit. Waits for its turn on the inference thread; everything else goes on."""
    probabilities = await runner.run(runner.model.probabilities, image.array())
    return Answer(digit=int(probabilities.argmax()), probabilities=probabilities.tolist())


@app.get("/samples")
async def samples(
    offset: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=100)] = 10
) -> list[Sample]:
    """Some of the held-out digits."""
    chosen = slice(offset, offset + limit)
    pairs = zip(HELD_OUT.pixels[chosen], HELD_OUT.labels[chosen], strict=True)
    return [Sample(pixels=pixels.tolist(), label=label) for pixels, label in pairs]


@app.get("/health")
async def health(request: Request) -> Health:
    """Answer at once, whatever the model is doing."""
    statistics = runner.statistics()
    return Health(
        status=statistics.state, accuracy=request.state.accuracy, runner=asdict(statistics)
    )


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page to draw on."""
    return FileResponse(Path(__file__).with_name("page.html"))


@app.exception_handler(RequestValidationError)
async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong with a request, in the words of the first error."""
    del request
    # Not FastAPI's own answer, which repeats the input: a NaN in it can't be written as JSON.
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return JSONResponse({"detail": f"{place}: {first['msg']}"}, status_code=422)
