"""Serve an example with uvicorn, and say where once it listens."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from socket import socket

import uvicorn
from starlette.types import ASGIApp

_PATIENCE = 2.0  # seconds that responses get to end in


def serve(app: ASGIApp, *, curl: Callable[[str], str]) -> None:
    """Serve ``app`` where the command line says, until it is interrupted.

    :param curl: makes a line to try the service with, from its address
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8000, type=int, help="0 for any that is free")
    options = parser.parse_args()
    config = uvicorn.Config(app, host=options.host, port=options.port, log_level="warning")
    server = _AnnouncingServer(config, curl)
    try:
        server.run()
    except KeyboardInterrupt:
        return  # uvicorn has shut down already, and raises it for its caller
    if not server.started:
        sys.exit(1)  # the log says why


class _AnnouncingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, curl: Callable[[str], str]) -> None:
        super().__init__(config)
        self._curl = curl

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and not self.should_exit:
            # Asked of the socket: port 0 has become a real one.
            port = self.servers[0].sockets[0].getsockname()[1]
            address = f"http://{_reachable(self.config.host)}:{port}"
            print(f"{address} is ready (Ctrl+C stops it). Open it in a browser, or try:\n")
            print(self._curl(address), flush=True)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        # uvicorn waits for every response, and a stream may go on for minutes.
        timer = asyncio.get_running_loop().call_later(_PATIENCE, self._hang_up)
        await super().shutdown(sockets)
        timer.cancel()

    def _hang_up(self) -> None:
        for connection in self.server_state.connections:
            connection.transport.close()


def _reachable(host: str) -> str:
    """``host`` as a part of an address, for one who sits at this machine."""
    if host == "0.0.0.0":
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
