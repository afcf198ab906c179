"""The package from outside: its names, its floors, what importing it costs, and its wheel."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

import asgi_infer
from asgi_infer import workers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asgi_infer"
PUBLIC = [
    "asgi_infer",
    "asgi_infer.fastapi",
    "asgi_infer.native",
    "asgi_infer.testing",
    "asgi_infer.testing.fixtures",
    "asgi_infer.workers",
]


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_sorted(name: str) -> None:
    """``__all__`` is sorted, capital letters first, and without doubles."""
    names = importlib.import_module(name).__all__
    assert names == sorted(set(names))


def test_all_is_all() -> None:
    """Whatever has a public name in the package is exported, and nothing else is."""
    public = {
        name
        for name, value in vars(asgi_infer).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(asgi_infer.__all__)
    assert len(public) <= 20


@pytest.mark.parametrize("name", PUBLIC)
def test_exports_are_documented(name: str) -> None:
    """Every exported class and function has a docstring, and so has every public method."""
    module = importlib.import_module(name)
    for exported in module.__all__:
        value = getattr(module, exported)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), exported
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and inspect.isfunction(method):
                assert method.__doc__, f"{exported}.{member}"


# -- floors ------------------------------------------------------------------------------------

# As in the documentation's table, whose last two floors are three each here.
FLOORS = [
    {
        "_errors",
        "_handoff",
        "_model",
        "_queue_policy",
        "_restarts",
        "_stacking",
        "_statistics",
        "native",
    },
    {"_call", "_checks"},
    {"_batch", "_buffer", "_foreign_pools", "_hints", "_overload", "_refusals"},
    {"_queue", "_suspended"},
    {"_slot"},
    {"_forecast"},
    {"_scheduler", "_watch", "workers"},
    {"_execute", "_future"},
    {"_stream", "_thread"},
    {"_exit"},
    {"_runner"},
    {"_batcher", "_client", "_lookup"},
    {"_lifespan", "fastapi"},
    {"middleware"},
    {"testing"},
    {"_launch", "doctor"},
    {"_commands"},
    {"cli"},
    {"__init__"},
]
FLOOR_OF = {unit: number for number, floor in enumerate(FLOORS) for unit in floor}


def modules() -> dict[str, ast.Module]:
    """All modules of the package, by their names below it."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in paths
    }


def imports(name: str, tree: ast.AST) -> Iterator[str]:
    """The modules of the package that ``name`` imports, anywhere in it, when it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = name.split(".")[: -node.level]
            source = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                yield existing([*source, alias.name])
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not any(str(each).startswith("asgi_infer") for each in names), "use a relative"
        yield from imports(name, node)


def existing(parts: list[str]) -> str:
    """The module that an imported name is or is in."""
    for length in (len(parts), len(parts) - 1):
        path = PACKAGE.joinpath(*parts[:length])
        if path.with_suffix(".py").exists() and length:
            return ".".join(parts[:length])
        if (path / "__init__.py").exists():
            return ".".join([*parts[:length], "__init__"])
    raise AssertionError(f"{parts} is no module")


GRAPH = {name: set(imports(name, tree)) for name, tree in modules().items()}


def test_graph_is_read_rightly() -> None:
    """The graph that the tests below look at has edges that are known to be there."""
    assert "_scheduler" in GRAPH["_thread"]
    assert "workers._protocol" in GRAPH["_thread"]
    assert "native.openmp" in GRAPH["_runner"]
    assert "native.policy" in GRAPH["native.__init__"]
    assert "_runner" in GRAPH["__init__"]
    assert "_call" in GRAPH["workers.thread"]


def test_every_module_has_a_floor() -> None:
    """A new module says on which floor it lives."""
    assert {name.partition(".")[0] for name in GRAPH} == set(FLOOR_OF)


@pytest.mark.parametrize("name", GRAPH)
def test_imports_go_down(name: str) -> None:
    """No module imports from its own floor or from above it."""
    unit = name.partition(".")[0]
    for imported in GRAPH[name]:
        below = imported.partition(".")[0]
        assert below == unit or FLOOR_OF[below] < FLOOR_OF[unit], f"{name} imports {imported}"


def test_no_cycle() -> None:
    """No module imports itself by any detour, not even inside of functions."""
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(GRAPH)


def test_floors_are_documented() -> None:
    """The documentation puts every module on the same floors, lowest first."""
    page = (ROOT / "docs/explanation/design.md").read_text()
    rows = re.findall(r"^\| \d+ \| (.*?) \|", page, re.MULTILINE)
    documented = [set(re.findall(r"`(\w+)/?`", row)) for row in rows]
    assert set().union(*documented) == set(FLOOR_OF) - {"__init__"}
    for lower, upper in pairwise(documented):
        assert max(FLOOR_OF[unit] for unit in lower) < min(FLOOR_OF[unit] for unit in upper)


def foreign(tree: ast.AST) -> Iterator[str]:
    """The packages from outside that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def test_only_the_edge_knows_the_web() -> None:
    """Web frameworks are imported by the errors and by what faces ASGI, and nowhere else."""
    knowing = {
        name for name, tree in modules().items() if {"starlette", "fastapi"} & set(foreign(tree))
    }
    edge = {"_errors", "_client", "_lifespan", "_lookup", "middleware", "fastapi"}
    assert knowing <= {*edge, "doctor._server"}
    assert "_errors" in knowing


# -- what importing costs ----------------------------------------------------------------------

IMPORT = """
import sys
before = set(sys.modules)
import asgi_infer
loaded = {name for name in set(sys.modules) - before if not name.startswith("asgi_infer")}
import json, logging, os, signal, threading
print(json.dumps({
    "foreign": sorted(n for n in loaded if n.partition(".")[0] not in sys.stdlib_module_names),
    "threads": threading.active_count(),
    "native": len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 1,
    "handlers": len(logging.getLogger().handlers + logging.getLogger("asgi_infer").handlers),
    "signals": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
}))
"""


def test_light_import() -> None:
    """Importing the package loads one small module of Starlette's and nothing else from outside:
    no framework, no NumPy, no event loop; and it starts and sets nothing."""
    command = [sys.executable, "-c", IMPORT]
    result = subprocess.run(command, check=True, timeout=30, capture_output=True, text=True)
    assert json.loads(result.stdout) == {
        "foreign": ["starlette", "starlette.exceptions"],
        "threads": 1,
        "native": 1,
        "handlers": 0,
        "signals": True,
    }


def test_without_fastapi() -> None:
    """Where FastAPI isn't installed, its module says what to install."""
    script = (
        "import sys; sys.modules['fastapi'] = None\n"
        "try: import asgi_infer.fastapi\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, check=True, timeout=30, capture_output=True, text=True)
    assert "pip install 'asgi-infer[fastapi]'" in result.stdout


def test_a_worker_that_there_is_none() -> None:
    """Workers are loaded when they are asked for; what is none is said to be none."""
    with pytest.raises(AttributeError, match=r"^module 'asgi_infer\.workers' .* 'NoWorker'$"):
        _ = workers.NoWorker


# -- the wheel ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as for a release."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(directory), str(ROOT)]
    subprocess.run(command, check=True, timeout=50, capture_output=True)
    (path,) = directory.glob("*.whl")
    return path


def test_wheel_holds_the_package(wheel: Path) -> None:
    """All of the package is in the wheel, the mark of its types and the template of the doctor's
    report too, and nothing beside it."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert names == sources | {"asgi_infer/py.typed", "asgi_infer/doctor/report.html.jinja"}


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    """At run time: Starlette, AnyIO and NumPy. The rest is extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    required = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert [each.partition(">")[0].partition("<")[0] for each in sorted(required)] == [
        "anyio",
        "numpy",
        "starlette",
    ]
    assert metadata["Requires-Python"] == ">=3.11"


USE = """
import asgi_infer, asyncio, pathlib
async def main():
    async with asgi_infer.InferenceRunner(dict) as runner:
        return await runner.run(runner.model.get, "key", 3)
assert asyncio.run(main()) == 3
print(pathlib.Path(asgi_infer.__file__).parent)
"""


def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The wheel installs into an environment with nothing in it, and works there.

    What it needs is lent from here by a path: it need not be downloaded again.
    """
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin/python"
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *options]
    subprocess.run(pip, check=True, timeout=50, capture_output=True)
    (site,) = tmp_path.glob("lib/*/site-packages")
    lent = Path(inspect.getfile(pytest)).parents[1]
    (site / "lent.pth").write_text(f"{lent}\n")  # of which no .pth is read: not this repository
    command = [str(python), "-I", "-c", USE]
    result = subprocess.run(command, check=True, timeout=30, capture_output=True, text=True)
    assert Path(result.stdout.strip()) == site / "asgi_infer"
