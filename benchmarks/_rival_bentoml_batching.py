"""Batches behind BentoML, as its documentation has it: one worker."""
# pyright: reportMissingImports=false

from __future__ import annotations

import bentoml

from ._batches import SIZE
from ._work import Work


@bentoml.service(workers=1)
class Batches:
    """One digit for each request."""

    def __init__(self) -> None:
        self.work = Work.told()
        self.work.predict()

    # Its dispatcher finds its own window, up to this.
    @bentoml.api(batchable=True, max_batch_size=SIZE, max_latency_ms=1000)  # type: ignore[untyped-decorator]
    def predict(self, items: list[int]) -> list[int]:
        return self.work.predict_many(items)
