"""``asgi-infer``, the command. Needs the extra ``doctor``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ("typer",)
_NEEDED_BY_DOCTOR = ("rich", "fastapi", "uvicorn", "matplotlib", "jinja2", "markupsafe")


def main() -> None:
    """Run the command, or say how to install what it needs, and exit with 1."""
    needed = _NEEDED + (_NEEDED_BY_DOCTOR if sys.argv[1:2] == ["doctor"] else ())
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        sys.exit(f"asgi-infer needs {', '.join(missing)}: pip install 'asgi-infer[doctor]'")
    from ._commands import app

    app(prog_name="asgi-infer")
