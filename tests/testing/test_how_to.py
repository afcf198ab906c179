"""The test-suite on the how-to page: it passes, here and now."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

from asgi_infer import testing

PAGE = Path(__file__).parents[2] / "docs/how-to/testing.md"

APP, TESTS = (
    re.search(rf"^```{fence}\n(.*?)^```\n", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    for fence in ("python", "py")
)
assert APP is not None
assert TESTS is not None

app = ModuleType("app")
exec(compile(APP[1], str(PAGE), "exec"), vars(app))
sys.modules["app"] = app  # for the import on the page
try:
    exec(compile(TESTS[1], str(PAGE), "exec"), globals())  # pytest finds its tests in here
finally:
    del sys.modules["app"]


def test_the_page_has_tests() -> None:
    """The tests of the page are among those of this file."""
    assert {"test_overload", "test_too_slow", "test_a_model_that_fails"} <= set(globals())


def test_the_reference_names_everything() -> None:
    """The reference page has a table row for each public name of the module."""
    text = (PAGE.parents[1] / "reference.md").read_text()
    for name in testing.__all__:
        assert f"`{name}" in text, name
