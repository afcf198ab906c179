"""Search the Python manual by meaning: a text-embedding model behind FastAPI, in batches."""

from __future__ import annotations

import logging
import sys

from .._serve import serve


def curl(address: str) -> str:
    """A line that searches for something the manual says in other words."""
    return f"curl -G {address}/search --data-urlencode 'q=stop a loop early' -d limit=1"


if __name__ == "__main__":
    logging.basicConfig()  # before wordllama does it, which would also show INFO of everything
    try:
        from .app import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"This example needs {error.name}. To install all that it needs:\n\n"
            "pip install --group embeddings"
        )
    serve(app, curl=curl)
