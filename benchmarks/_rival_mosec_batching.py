"""Batches behind mosec, as its documentation has it: one worker."""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from mosec import Server, Worker

from ._batches import SIZE, WINDOW
from ._work import Work


class Batches(Worker):  # type: ignore[misc]  # not installed where types are checked
    """One digit for each request."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work.told()
        self.work.predict()

    def forward(self, data: list[Any]) -> list[Any]:
        digits = self.work.predict_many([each["number"] for each in data])
        return [{"digit": digit} for digit in digits]


if __name__ == "__main__":
    server = Server()
    milliseconds = round(1000 * WINDOW)
    server.append_worker(Batches, num=1, max_batch_size=SIZE, max_wait_time=milliseconds)
    server.run()  # where it listens is in the environment
