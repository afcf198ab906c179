"""The batches of the package ``batched`` in a FastAPI application, as its documentation has it."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os

import batched
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from ._batches import SIZE
from ._work import Work


class Item(BaseModel):
    """What a request brings."""

    number: int


class Model:
    """Warmed up when it is made."""

    def __init__(self) -> None:
        self._work = Work.told()
        self._work.predict()

    @batched.dynamically(batch_size=SIZE)  # type: ignore[untyped-decorator]  # not installed
    def predict(self, numbers: list[int]) -> list[int]:
        return self._work.predict_many(numbers)


app = FastAPI()
model = Model()


@app.post("/predict")
async def predict(item: Item) -> int:
    digit: int = await model.predict.acall(item.number)
    return digit


if __name__ == "__main__":
    port = int(os.environ["BENCH_PORT"])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
