"""Three networks that find and read text, run by ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rapidocr_onnxruntime import RapidOCR

from asgi_infer.native import thread_count


class UnreadableImage(ValueError):
    """It begins like an image, and then is none."""


@dataclass(frozen=True)
class Line:
    """A line of text: how sure the model is of it, and the four corners around it."""

    text: str
    score: float
    box: list[list[float]]


class PageReader:
    """Reads the text on a photograph. The networks come with rapidocr-onnxruntime."""

    def __init__(self) -> None:
        # ONNX Runtime has no OpenMP that a policy could hold back: each network gets a pool of
        # its own when it is loaded, and must be told its size. Left alone it takes one thread
        # for each core of the machine and pins it there, whatever this process may use; behind
        # a quota, threads then wait for each other while none may run. The caller is one of the
        # threads, so the three pools hold `threads - 1` each, and work one after another.
        # They inherit this thread's name, niceness and CPUs.
        threads = thread_count()
        self._engine = RapidOCR(
            intra_op_num_threads=threads,
            inter_op_num_threads=1,  # each network is a chain: nothing in it can run side by side
            det_box_thresh=0.3,  # faint lines as well
            cls_thresh=0.98,  # turn a line upside down only when all but certain
        )
        cv2.setNumThreads(threads)  # OpenCV cuts the lines out, on a pool of its own

    def read(self, data: bytes) -> list[Line]:
        """The lines of text on an image, from top to bottom.

        Decoding the image is native work like the rest, and has its place here as well.

        :param data: the image file
        :raises UnreadableImage: it is damaged
        """
        pixels, scale = _enlarge(_decode(data))
        found: Any = self._engine(pixels)[0] or []
        return [
            Line(text, round(float(score), 3), (np.asarray(box) / scale).round(1).tolist())
            for box, text, score in found
        ]


def _decode(data: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(data))
        return ImageOps.exif_transpose(image).convert("RGB")  # phones store pages lying down
    except Exception as error:  # whatever the decoders of the many formats raise
        raise UnreadableImage("the image is damaged") from error


def _enlarge(image: Image.Image) -> tuple[NDArray[np.uint8], int]:
    """The pixels, in the order blue, green, red, and how much larger small images were made."""
    scale = 2 if min(image.size) < 400 else 1
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale))
    return np.asarray(image)[:, :, ::-1].copy(), scale
