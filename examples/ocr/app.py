"""The web application, plain Starlette: a form to upload a page with, and the model behind it."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import skimage.data
from PIL import Image, UnidentifiedImageError
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive

from asgi_infer import InferenceMiddleware, InferenceRunner

from .model import PageReader, UnreadableImage

MAX_BYTES = 8 * 2**20
MAX_PIXELS = 40_000_000  # a few kilobytes can unpack to a picture that fills the memory
MAX_RATIO = 8  # the reader scales by the shorter side, so a long strip would become enormous
FORMATS = ("JPEG", "PNG", "WEBP")


@cache
def sample_page() -> bytes:
    """A photographed page, as a PNG file. It comes with scikit-image."""
    photographs: Any = skimage.data  # its functions have no types
    file = BytesIO()
    Image.fromarray(photographs.page()).save(file, "PNG")
    return file.getvalue()


runner = InferenceRunner(
    PageReader,
    warmup=lambda reader: reader.read(sample_page()),
    name="ocr",
    # A page takes a good part of a second. Who would wait longer than this has given up.
    max_queue=32,
    timeout=60,
)


async def read(request: Request) -> Response:
    """Read the uploaded page. Waits for its turn on the inference thread."""
    data = await receive_image(request)
    check_image(data)
    try:
        lines = await runner.run(runner.model.read, data)
    except UnreadableImage as error:
        raise HTTPException(422, str(error)) from error
    return JSONResponse({"lines": [asdict(line) for line in lines]})


async def receive_image(request: Request) -> bytes:
    """The file in the field ``image`` of a form."""
    limited = Request(request.scope, at_most(MAX_BYTES, request))
    try:
        async with limited.form(max_files=1, max_fields=1) as form:
            file = form.get("image")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "send an image file, as the field 'image' of a form")
            return await file.read()
    except ClientDisconnect:
        raise HTTPException(499, "the client hung up during the upload") from None


def at_most(limit: int, request: Request) -> Receive:
    """The request's ``receive``, which refuses bodies larger than ``limit`` bytes."""
    too_large = HTTPException(413, f"the upload is larger than {limit} bytes")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large  # before anything of it has been read
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise too_large
        return message

    return receive


def check_image(data: bytes) -> None:
    """Look at the head of the file only, so that nothing hopeless waits for the model."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            short, long = sorted(image.size)
    except UnidentifiedImageError:
        raise HTTPException(415, "this is no JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError:
        raise HTTPException(413, f"the image has more than {MAX_PIXELS} pixels") from None
    if short * long > MAX_PIXELS:
        raise HTTPException(413, f"the image has more than {MAX_PIXELS} pixels")
    if long > MAX_RATIO * short:
        raise HTTPException(422, f"the image is more than {MAX_RATIO} times as long as wide")


async def sample(request: Request) -> Response:
    """A page to try it with."""
    del request
    return Response(sample_page(), media_type="image/png")


async def health(request: Request) -> Response:
    """Answer at once, whatever the model is doing."""
    del request
    statistics = runner.statistics()
    return JSONResponse({"status": statistics.state, "runner": asdict(statistics)})


async def page(request: Request) -> Response:
    """The form."""
    del request
    return FileResponse(Path(__file__).with_name("page.html"))


app = Starlette(
    routes=[
        Route("/", page),
        Route("/read", read, methods=["POST"]),
        Route("/sample", sample),
        Route("/health", health),
    ],
    middleware=[Middleware(InferenceMiddleware, runner=runner)],
)
