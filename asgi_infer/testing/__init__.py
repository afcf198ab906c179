"""For tests: runners without threads, faults on demand, and a simulator of the queue.

::

    with run_inline(runner, FakeModel) as inline, inline.full():
        assert client.post("/predict").status_code == 503

pytest users load the fixture with ``pytest_plugins = ["asgi_infer.testing.fixtures"]``.
"""

from ._clock import VirtualClock
from ._inline import Inline, InlineRunner, run_inline
from ._load import Batching, Request, burst, poisson, steady
from ._report import Outcome, Report
from ._simulation import Simulation

__all__ = [
    "Batching",
    "Inline",
    "InlineRunner",
    "Outcome",
    "Report",
    "Request",
    "Simulation",
    "VirtualClock",
    "burst",
    "poisson",
    "run_inline",
    "steady",
]
