"""Both ends of a channel in one process: a child's part is played on a thread."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from asgi_infer.doctor._channel import Channel

from ..gates import LIMIT


class Parent:
    """The other end of a channel."""

    def __init__(self) -> None:
        told, self._tell = os.pipe()
        self._hear, said = os.pipe()
        self.channel = Channel(os.fdopen(told, "rb", 0), os.fdopen(said, "wb", 0))
        self._heard = os.fdopen(self._hear, "rb")

    def tell(self, **values: object) -> None:
        """Say something to the child."""
        os.write(self._tell, json.dumps(values).encode() + b"\n")

    def ask(self) -> dict[str, Any]:
        """What the child says next."""
        answer: dict[str, Any] = json.loads(self._heard.readline())
        return answer

    def hang_up(self) -> None:
        """No more is said."""
        os.close(self._tell)

    def close(self) -> None:
        """After the child has ended."""
        self.channel.reader.close()
        self.channel._writer.close()
        self._heard.close()


@contextmanager
def played(part: Callable[[Channel], object]) -> Iterator[Parent]:
    """A child that plays ``part`` on a thread of this process, until the block is over."""
    parent = Parent()

    def play() -> None:
        try:
            part(parent.channel)
        except SystemExit:  # its input has ended
            pass

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield parent
    finally:
        parent.hang_up()
        thread.join(LIMIT)
        parent.close()
    assert not thread.is_alive()
