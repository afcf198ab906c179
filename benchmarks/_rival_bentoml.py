"""The digits behind BentoML, as its documentation has it: one worker, no batching."""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from pathlib import Path

import bentoml

from ._models import Trained, warm_up


@bentoml.service(workers=1)
class Digits:
    """One digit for each request."""

    def __init__(self) -> None:
        self.model = Trained(Path(os.environ["BENCH_FILE"]))
        warm_up(self.model)

    @bentoml.api  # type: ignore[untyped-decorator]  # not installed where types are checked
    def predict(self) -> int:
        return self.model.predict()
