"""A real model's native threads, in a process of their own: what they run under, and whether they
have the whole CPU, which is told by how often the runner's thread gives it up."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from asgi_infer.native.cpu import IMPORT_AFFINITY, recommended_threads

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(recommended_threads() < 2, reason="one CPU has nothing to wait for"),
]

# The model is trained on the main thread, as when it is loaded while the application is imported,
# and has a thread pool there when the runner starts.
SCRIPT = """
import json, os, sys, threading
from statistics import median
from sklearn.datasets import load_digits
from sklearn.ensemble import HistGradientBoostingClassifier
from asgi_infer import InferenceRunner, NativePolicy
from asgi_infer.native import openmp, procfs

DIGITS, LABELS = load_digits(return_X_y=True)
model = HistGradientBoostingClassifier(max_iter=30).fit(DIGITS, LABELS)

def look(native_id):
    return {
        "name": procfs.thread_name(native_id),
        "niceness": os.getpriority(os.PRIO_PROCESS, native_id),
        "affinity": sorted(os.sched_getaffinity(native_id)),
    }

def switches_of_a_call():
    before = procfs.voluntary_switches(threading.get_native_id())
    model.predict(DIGITS[:200])
    return procfs.voluntary_switches(threading.get_native_id()) - before

def measure():
    others = procfs.thread_ids()
    model.predict(DIGITS[:200])
    return {
        "runner": look(threading.get_native_id()),
        "helpers": [look(native_id) for native_id in procfs.thread_ids() - others],
        "switches": median(switches_of_a_call() for _ in range(15)),
    }

def measured():
    model.predict(DIGITS[:200])  # the second time it has no pool here any more
    with InferenceRunner(name="digits", native=NativePolicy(nice=3)) as runner:
        measured = runner.submit(measure).result()
    measured["niceness"] = os.getpriority(os.PRIO_PROCESS, 0)
    measured["main"] = procfs.thread_name(os.getpid())
    return measured

release = measured()
openmp.release_pools = lambda: 0
print(json.dumps({"release": release, "keep": measured()}))
"""


@cache
def measured() -> dict[str, Any]:
    """With the main thread's pool given back when the runner starts, and with that pool kept."""
    command = [sys.executable, "-c", SCRIPT]
    output = subprocess.run(command, check=True, timeout=50, capture_output=True, text=True).stdout
    return dict(json.loads(output))


def test_runner_thread() -> None:
    """The runner's thread has its name, niceness and every CPU; the main one is as it was."""
    seen = measured()["release"]
    expected = {"name": "digits", "niceness": seen["niceness"] + 3}
    assert seen["runner"] == expected | {"affinity": sorted(IMPORT_AFFINITY)}
    assert seen["main"] != "digits"
    assert seen["niceness"] == os.getpriority(os.PRIO_PROCESS, 0)


def test_helpers_are_as_the_runner_thread() -> None:
    """The threads that scikit-learn starts there are as many as there are CPUs, less one, and run
    under the same name, niceness and CPUs."""
    seen = measured()["release"]
    assert seen["helpers"] == [seen["runner"]] * (recommended_threads() - 1)


def test_whole_cpu() -> None:
    """With the main thread's pool given back, a call hardly ever gives up its CPU."""
    assert measured()["release"]["switches"] < 20


def test_control() -> None:
    """With that pool kept, the same call gives it up for every tree: the test above can fail."""
    assert measured()["keep"]["switches"] > 40


# -- other libraries ---------------------------------------------------------------------------

# The library is first imported while the model is loaded, so that its threads start there.
LIBRARIES = """
import json, os, sys, threading
from pathlib import Path
from asgi_infer import InferenceRunner, NativePolicy
from asgi_infer.native import openblas, procfs, thread_count

def look(native_id):
    return {
        "name": procfs.thread_name(native_id),
        "niceness": os.getpriority(os.PRIO_PROCESS, native_id),
        "affinity": sorted(os.sched_getaffinity(native_id)),
    }

class OpenBLAS:
    def __init__(self):
        import numpy
        self.matrix = numpy.ones((600, 600))
    def run(self):
        self.matrix @ self.matrix
    def threads(self):
        return max(library.threads for library in openblas.loaded_libraries())

class ONNXRuntime:
    def __init__(self):
        import numpy, onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_count()
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(sys.argv[3], options, providers=providers)
        self.image = numpy.ones((1, 3, 64, 64), numpy.float32)
    def run(self):
        self.session.run(None, {self.session.get_inputs()[0].name: self.image})
    def threads(self):
        return self.session.get_session_options().intra_op_num_threads

library = {"openblas": OpenBLAS, "onnxruntime": ONNXRuntime}[sys.argv[1]]
before = procfs.thread_ids()
# OpenBLAS starts as many threads as there are CPUs; ONNX Runtime would bind its own to others.
cpus = {max(os.sched_getaffinity(0))} if library is ONNXRuntime else None
policy = NativePolicy(nice=3, threads=int(sys.argv[2]), cpus=cpus)

def measure(model):
    model.run()
    return {
        "runner": look(threading.get_native_id()),
        "helpers": [look(each) for each in procfs.thread_ids() - before
                    if each != threading.get_native_id()],
        "threads": model.threads(),
    }

loop = look(os.getpid())
with InferenceRunner(library, name="digits", native=policy) as runner:
    measured = runner.submit(measure, runner.model).result()
assert loop == look(os.getpid())
print(json.dumps(measured))
"""


def detector() -> Path | None:
    """A real ONNX model, from the wheel of the OCR example."""
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("models/*_det_*.onnx"), None)


def measured_library(name: str, threads: int, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-c", LIBRARIES, name, str(threads), *arguments]
    # OpenBLAS starts no threads that it is told not to use.
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    result = subprocess.run(
        command, check=True, timeout=50, capture_output=True, text=True, env=environment
    )
    return dict(json.loads(result.stdout))


def runs_as_told(seen: dict[str, Any], cpus: list[int]) -> bool:
    runner = {
        "name": "digits",
        "niceness": os.getpriority(os.PRIO_PROCESS, 0) + 3,
        "affinity": cpus,
    }
    return seen["runner"] == runner and all(helper == runner for helper in seen["helpers"])


@pytest.mark.parametrize("threads", [1, 2])
def test_openblas(threads: int) -> None:
    """OpenBLAS's threads run under the runner's name, niceness and CPUs, and no more of them
    compute than the policy says; the main thread keeps its own."""
    seen = measured_library("openblas", threads)
    assert runs_as_told(seen, sorted(IMPORT_AFFINITY))
    assert len(seen["helpers"]) == len(IMPORT_AFFINITY) - 1
    assert seen["threads"] == threads


@pytest.mark.skipif(detector() is None, reason="the OCR example is not installed")
def test_onnx_runtime() -> None:
    """ONNX Runtime, given ``thread_count()``, has as many threads as the policy says, and binds
    them to no other CPUs than the policy's."""
    helpers = {}
    for threads in (1, 3):
        seen = measured_library("onnxruntime", threads, str(detector()))
        assert runs_as_told(seen, [max(IMPORT_AFFINITY)])
        assert seen["threads"] == threads
        helpers[threads] = len(seen["helpers"])  # it has some for other purposes, too
    assert helpers[3] == helpers[1] + 2
