"""The digits behind mosec, as its documentation has it: one worker, no batching."""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mosec import Server, Worker

from ._models import Trained, warm_up


class Digits(Worker):  # type: ignore[misc]  # not installed where types are checked
    """One digit for each request."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Trained(Path(os.environ["BENCH_FILE"]))
        warm_up(self.model)

    def forward(self, data: Any) -> Any:
        del data
        return {"digit": self.model.predict()}


if __name__ == "__main__":
    server = Server()
    server.append_worker(Digits, num=1)
    server.run()  # where it listens is in the environment
