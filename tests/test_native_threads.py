"""A real model's native threads, in a process of their own: what they run under, and whether they
have the whole CPU, which is told by how often the runner's thread gives it up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
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
model = HistGradientBoostingClassifier(max_iter=10).fit(DIGITS, LABELS)
if sys.argv[1] == "keep":
    openmp.release_pools = lambda: 0

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

with InferenceRunner(name="digits", native=NativePolicy(nice=3)) as runner:
    measured = runner.submit(measure).result()
measured["niceness"] = os.getpriority(os.PRIO_PROCESS, 0)
measured["main"] = procfs.thread_name(os.getpid())
print(json.dumps(measured))
"""


@cache
def measured(pool: str) -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, pool]
    output = subprocess.run(command, check=True, timeout=50, capture_output=True, text=True).stdout
    return dict(json.loads(output))


def test_runner_thread() -> None:
    """The runner's thread has its name, niceness and every CPU; the main one is as it was."""
    seen = measured("release")
    expected = {"name": "digits", "niceness": seen["niceness"] + 3}
    assert seen["runner"] == expected | {"affinity": sorted(IMPORT_AFFINITY)}
    assert seen["main"] != "digits"
    assert seen["niceness"] == os.getpriority(os.PRIO_PROCESS, 0)


def test_helpers_are_as_the_runner_thread() -> None:
    """The threads that scikit-learn starts there are as many as there are CPUs, less one, and run
    under the same name, niceness and CPUs."""
    seen = measured("release")
    assert seen["helpers"] == [seen["runner"]] * (recommended_threads() - 1)


def test_whole_cpu() -> None:
    """With the main thread's pool given back, a call hardly ever gives up its CPU."""
    assert measured("release")["switches"] < 20


def test_control() -> None:
    """With that pool kept, the same call gives it up for every tree: the test above can fail."""
    assert measured("keep")["switches"] > 40
