"""The digits behind LitServe, as its documentation has it: one worker, one API server."""
# pyright: reportMissingImports=false
# LitServe looks at annotations: they have to be the types themselves, and no strings.

import os
from pathlib import Path
from typing import Any

import litserve
from fastapi import Request

from ._models import Trained, warm_up


class DigitsAPI(litserve.LitAPI):  # type: ignore[misc]  # not installed where types are checked
    """One digit for each request."""

    def setup(self, device: str) -> None:
        del device
        self.model = Trained(Path(os.environ["BENCH_FILE"]))
        warm_up(self.model)

    def decode_request(self, request: Request) -> Any:
        return request

    def predict(self, x: Any) -> int:
        del x
        return self.model.predict()

    def encode_response(self, output: int) -> Any:
        return {"digit": output}


if __name__ == "__main__":
    litserve.LitServer(DigitsAPI(), accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )
