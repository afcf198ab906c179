"""A Ray cluster on this machine, for as long as some tests need it. Its start takes seconds."""

from __future__ import annotations

import gc
import os
import secrets
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]

# Ray reads most of these once, when it is imported; and that is nobody else's doing in the tests.
os.environ |= {
    # Ray puts the machine's address in the place of the loopback's, unless it takes this for a
    # system on which it knows no clusters.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else one is made in the home directory
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default to be, of which it warns
}


@contextmanager
def cluster() -> Iterator[None]:
    """Two CPUs, no dashboard, and nothing that listens on another address than the loopback's."""
    at_sigterm = signal.getsignal(signal.SIGTERM)
    # Where actors find the package, and what the tests run in them.
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        ray: Any = import_module("ray")
        with forgetful():
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address="127.0.0.1",
            )
        try:
            yield
        finally:
            with forgetful():
                ray.shutdown()
            signal.signal(signal.SIGTERM, at_sigterm)


@contextmanager
def forgetful() -> Iterator[None]:
    """Ray drops files and processes that it has not closed, of which Python would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
