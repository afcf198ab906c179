"""Without a web framework: one runner awaited from asyncio, from trio, and from plain threads."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from asgi_infer import DeadlineExceeded, InferenceRunner, check_cancelled

Matrix = NDArray[np.float64]


class Decomposer:
    """Takes matrices apart with LAPACK. Stands for any model: it is made on its own thread."""

    def singular_values(self, matrix: Matrix) -> Matrix:
        """The singular values of ``matrix``, the largest first."""
        return np.asarray(np.linalg.svd(matrix, compute_uv=False), dtype=np.float64)

    def rank(self, matrix: Matrix) -> int:
        """How many of them are not zero."""
        values = self.singular_values(matrix)
        return int((values > values[0] * 1e-9).sum())

    def never_ends(self, matrix: Matrix) -> None:
        """Goes on for as long as somebody waits for it."""
        while True:
            self.singular_values(matrix)
            check_cancelled()  # native code can't be interrupted; between its calls, one can stop


runner = InferenceRunner(Decomposer)
random = np.random.default_rng(0)
tall = random.standard_normal((600, 200))
flat = np.outer(np.arange(1.0, 301.0), np.arange(1.0, 301.0))


async def main() -> None:
    """What an application does with a runner, on whichever event loop this runs."""
    async with runner:  # loads the model; stops the thread at the end
        values = await runner.run(runner.model.singular_values, tall)
        print(f"run: the largest singular value is {values[0]:.2f}")

        rank = runner.wrap(runner.model.rank)
        print(f"wrap: the ranks are {await rank(tall)} and {await rank(flat)}")

        try:
            await runner.run(runner.model.never_ends, flat, timeout=0.2)
        except DeadlineExceeded as error:
            print(f"timeout: {error}")

        await runner.wait_idle()
        print(f"statistics: {runner.statistics()}")


def without_a_loop() -> None:
    """The same from synchronous code: a runner is a ``concurrent.futures`` executor."""
    with InferenceRunner(Decomposer) as executor:
        future = executor.submit(executor.model.rank, flat)
        print(f"submit: the rank is {future.result()}")
        print(f"map: the ranks are {list(executor.map(executor.model.rank, [tall, flat]))}")


def under_trio() -> None:
    """``main`` on the other event loop, with the same runner, which has stopped and restarts."""
    import trio

    trio.run(main)


if __name__ == "__main__":
    print("-- asyncio")
    asyncio.run(main())
    if find_spec("trio") is not None:
        print("-- trio")
        under_trio()
    print("-- no event loop")
    without_a_loop()
