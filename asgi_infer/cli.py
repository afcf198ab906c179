"""``asgi-infer``, the command. Needs the extra ``doctor``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich", "fastapi", "uvicorn", "matplotlib", "jinja2")


def main() -> None:
    """Run the command, or say how to install what it needs, and exit with 1."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"asgi-infer needs {', '.join(missing)}: pip install 'asgi-infer[doctor]'")
    from ._commands import app

    app(prog_name="asgi-infer")
