"""Where it is measured: the CPUs that there are, who else uses them, and what runs the model."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from ..native import cpu, noise, procfs
from ..native._maps import mapped_files
from ._results import Machine

_POOLS = re.compile(
    r"/(?:lib)?(?:scipy_)?(gomp|iomp5|omp|openblas|mkl_rt|mkl_core|tbb|onnxruntime)"
    r"[^/]*\.so[^/]*$"
)
_NAMES = {
    "gomp": "libgomp",
    "omp": "libomp",
    "iomp5": "libiomp5",
    "openblas": "OpenBLAS",
    "mkl_rt": "MKL",
    "mkl_core": "MKL",
    "tbb": "TBB",
    "onnxruntime": "ONNX Runtime",
}


def describe(loudest: noise.Noise, runtimes: tuple[str, ...]) -> Machine:
    """This machine.

    :param loudest: what others did, at the worst
    :param runtimes: as ``runtimes`` finds them
    """
    budget = cpu.budget()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpus=len(budget.cpus),
        cores=budget.cores,
        quota=budget.quota,
        pressure=loudest.pressure,
        others=loudest.others,
        stolen=loudest.stolen,
        noisy=loudest.busy,
        runtimes=runtimes,
        counted=bool(procfs.all_thread_counters()),
    )


def runtimes(pid: int) -> tuple[str, ...]:
    """The native thread pools that a process has loaded: ``libgomp (scikit_learn)``."""
    files = mapped_files(_POOLS, Path(f"/proc/{pid}/maps"))
    found = {f"{_NAMES[match[1]]} ({_package(path)})" for path, match in files.items()}
    return tuple(sorted(found))


def _package(path: str) -> str:
    """The one that a library came with."""
    _, packages, rest = path.rpartition("-packages/")
    return rest.partition("/")[0].removesuffix(".libs") if packages else "system"
