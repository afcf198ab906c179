"""A child process that does what a test tells it, and the test's side of the conversation."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from types import TracebackType
from typing import Any, Self

from asgi_infer.workers._child import Child

TARGET = f"{__name__}:serve"


def serve(fd: int) -> None:
    """In the child: evaluate each line, and answer with what comes out, as JSON."""
    names: dict[str, Any] = {"fd": fd, "os": os, "sys": sys}
    with socket.socket(fileno=fd) as sock, sock.makefile("rw") as lines:
        print("ready", file=sys.stderr)
        for line in lines:
            code = compile(json.loads(line), "<test>", "exec")
            names["answer"] = None
            exec(code, names)
            lines.write(json.dumps(names["answer"]) + "\n")
            lines.flush()


class Obedient:
    """A child that runs ``serve``, while the ``with`` block lasts."""

    def __init__(self, **options: Any) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(10)
        options = {"name": "m-0", "target": TARGET, "fds": [theirs.fileno()], **options}
        with theirs:
            try:
                self.child = Child(**options)
            except BaseException:
                self.sock.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.child.close()
        self.sock.close()

    def tell(self, code: str) -> None:
        """Have it run some statements."""
        self.sock.sendall(json.dumps(code).encode() + b"\n")

    def answer(self) -> Any:
        """What the statements have assigned to ``answer``; logs what it prints meanwhile.

        :raises EOFError: it has ended
        """
        received = b""
        while not received.endswith(b"\n"):
            self.listen()
            if self.readable():
                data = self.sock.recv(1 << 16)
                if not data:
                    raise EOFError
                received += data
        return json.loads(received)

    def ask(self, code: str) -> Any:
        """Both."""
        self.tell(code)
        return self.answer()

    def listen(self) -> None:
        """Wait for it to write, or to answer, or to end, and log a turn of what it wrote."""
        poll = select.poll()
        for fd in (self.sock.fileno(), *self.child.log_fds):
            poll.register(fd, select.POLLIN)
        assert poll.poll(10_000), "it hangs"
        self.child.pump()

    def readable(self) -> bool:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))
