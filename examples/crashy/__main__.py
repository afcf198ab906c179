"""A native function that crashes on some input, and a service that survives it."""

from __future__ import annotations

import logging

from .._serve import serve
from .app import app


def curl(address: str) -> str:
    """A line that asks for an element. With 119 for 26, it crashes the model."""
    return f"curl {address}/elements/26"


if __name__ == "__main__":
    logging.basicConfig(format="%(name)s: %(message)s")  # with what a crash leaves in the log
    serve(app, curl=curl)
