"""Draw a digit, and scikit-learn reads it: a page, and an API, behind FastAPI."""

from __future__ import annotations

import json

from .._serve import serve
from .app import HELD_OUT, app


def curl(address: str) -> str:
    """A line that has the first of the held-out digits read."""
    body = json.dumps({"pixels": HELD_OUT.pixels[0].astype(int).tolist()}, separators=(",", ":"))
    return f"curl {address}/predict -H 'Content-Type: application/json' -d '{body}'"


if __name__ == "__main__":
    print("learning to read digits, a few seconds ...", flush=True)
    serve(app, curl=curl)
