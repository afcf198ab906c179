"""Upload a photographed page, and read its text: ONNX Runtime behind Starlette."""

from __future__ import annotations

import sys

from .._serve import serve


def curl(address: str) -> str:
    """A line that has the sample page read."""
    return f"curl -s {address}/sample | curl -s -F image=@- {address}/read"


if __name__ == "__main__":
    try:
        from .app import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"This example needs {error.name}. To install all that it needs:\n\n"
            "pip install --group ocr\n"
            "pip install --no-deps 'rapidocr-onnxruntime>=1.4,<2'"
        )
    serve(app, curl=curl)
