"""What a Ray worker costs beside the bare call of an actor's method, on one local cluster.

As a program, in an environment with Ray: both arms, pass by pass.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

import numpy as np
import ray

from asgi_infer import InferenceRunner
from asgi_infer.workers import RayWorker

from ._children import answer
from ._isolated import Once, passes

_CLUSTER: dict[str, Any] = {
    "address": "local",
    "num_cpus": 4,  # to place by; an idle actor uses none
    "object_store_memory": 256 * 2**20,
    "include_dashboard": False,
    "log_to_driver": False,
    "configure_logging": False,
    "_node_ip_address": "127.0.0.1",
}


class Model:
    """What lives in an actor."""

    def noop(self) -> None:
        """Nothing."""

    def add(self, array: Any) -> Any:
        """A new array: what comes out of Ray's object store can't be written to."""
        return array + 1


async def measure(count: int, calls: int) -> None:
    """Measure in this process and tell the parent."""
    array = np.ones(2**18, dtype=np.float32)
    actor: Any = ray.remote(Model).remote()
    async with InferenceRunner(Model, worker=RayWorker()) as runner:
        model = runner.model
        arms: dict[str, dict[str, Once]] = {
            "actor": {
                "noop": lambda: actor.noop.remote(),
                "array": lambda: actor.add.remote(array),
            },
            "RayWorker": {
                "noop": lambda: runner.run(model.noop),
                "array": lambda: runner.run(model.add, array),
            },
        }
        answer(**await passes(arms, count, calls))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._on_ray")
    parser.add_argument("--passes", type=int, required=True)
    parser.add_argument("--calls", type=int, required=True)
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(**_CLUSTER)
    try:
        asyncio.run(measure(options.passes, options.calls))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
