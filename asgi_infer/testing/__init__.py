"""For tests: runners without threads, faults on demand, and a simulator of the queue.

::

    with run_inline(runner, FakeModel) as inline, inline.full():
        assert client.post("/predict").status_code == 503

pytest users load the fixture with ``pytest_plugins = ["asgi_infer.testing.fixtures"]``.
"""

from ._clock import VirtualClock
from ._faults import Faults
from ._inline import InlineRunner, run_inline

__all__ = ["Faults", "InlineRunner", "VirtualClock", "run_inline"]
