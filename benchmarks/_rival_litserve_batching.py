"""Batches behind LitServe, as its documentation has it: one worker, one API server."""
# pyright: reportMissingImports=false
# LitServe looks at annotations: they have to be the types themselves, and no strings.

import os
from typing import Any

import litserve

from ._batches import SIZE, WINDOW
from ._work import Work


class BatchAPI(litserve.LitAPI):  # type: ignore[misc]  # not installed where types are checked
    """One digit for each request."""

    def setup(self, device: str) -> None:
        del device
        self.work = Work.told()
        self.work.predict()

    def decode_request(self, request: dict[str, int]) -> int:
        return request["number"]

    def predict(self, x: list[int]) -> list[int]:
        return self.work.predict_many(x)

    def encode_response(self, output: int) -> Any:
        return {"digit": output}


if __name__ == "__main__":
    api = BatchAPI(max_batch_size=SIZE, batch_timeout=WINDOW)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )
