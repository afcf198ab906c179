"""Watch a small language model write, and stop it: Server-Sent Events behind FastAPI."""

from __future__ import annotations

import logging
import sys

from .._serve import serve


def curl(address: str) -> str:
    """A line that has thirty words written."""
    return (
        f"curl -N -G {address}/generate --data-urlencode 'prompt=The with statement' -d words=30"
    )


if __name__ == "__main__":
    try:
        from .app import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"This example needs {error.name}. To install all that it needs:\n\n"
            "pip install --group stream"
        )
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)  # a line for each text that ends
    serve(app, curl=curl)
