"""Processes that meet as servers and their model process do, but without a model.

``race BASE SERVERS ROUNDS SEED`` has servers come, go, kill the model process and be killed, all
at once; ``model BASE LISTENER LOCK`` is that process. It tells each who connects its pid, and once
more whenever it is asked. ``BASE.alive`` is locked by it for as long as it lives: if ever there
are two, the second leaves ``BASE.two``. ``BASE.started`` gets a byte for each.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from asgi_infer.workers._rendezvous import Claim, Rendezvous

NAME = 16 * "0"


def serve(base: Path, listener: int, lock: int) -> NoReturn:
    """Be the model process: end when nobody is connected any more."""
    hold_alive(base)
    claim = Claim.inherited(listener, lock)
    poll = select.poll()
    poll.register(claim.listener, select.POLLIN)
    connections: dict[int, socket.socket] = {}
    while True:
        waiting = poll.poll(None if connections else 0)
        if not waiting:
            claim.withdraw()
            os._exit(0)
        for fd, _ in waiting:
            if fd in connections:
                if not answer(connections[fd]):
                    poll.unregister(fd)
                    connections.pop(fd).close()
            else:
                accept_all(claim, connections, poll)


def hold_alive(base: Path) -> None:
    """Lock the file in the place of the input: that is the first descriptor to be closed when
    a process dies, before those that free the way for the next."""
    os.dup2(os.open(f"{base}.alive", os.O_RDWR | os.O_CREAT), 0)
    try:
        fcntl.flock(0, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        Path(f"{base}.two").touch()
    with Path(f"{base}.started").open("a") as started:
        started.write(".")


def accept_all(claim: Claim, connections: dict[int, socket.socket], poll: Any) -> None:
    while (sock := claim.accept()) is not None:
        connections[sock.fileno()] = sock
        poll.register(sock, select.POLLIN)
        tell(sock)


def answer(sock: socket.socket) -> bool:
    try:
        asked = sock.recv(1)
    except ConnectionError:
        return False
    if asked:
        tell(sock)
    return bool(asked)


def tell(sock: socket.socket) -> None:
    try:
        sock.sendall(os.getpid().to_bytes(4, "big"))
    except ConnectionError:
        pass  # its end is read next


def start(base: Path, claim: Claim) -> subprocess.Popen[bytes]:
    """Start the model process, and give up the claim here."""
    arguments = [f"{base}", *map(str, claim.fds)]
    command = [sys.executable, "-m", "tests.workers.meeting", "model", *arguments]
    try:
        return subprocess.Popen(command, pass_fds=claim.fds)
    finally:
        claim.close()


def ask(sock: socket.socket) -> int:
    """The pid of the model process, which it tells when it is there, or 0 if it has died."""
    try:
        return int.from_bytes(sock.recv(4), "big")
    except ConnectionError:
        return 0


def come_and_go(base: Path, rounds: int, seed: int) -> None:
    """Be a server, one after the other."""
    chance = random.Random(seed)
    started: list[subprocess.Popen[bytes]] = []
    for _ in range(rounds):
        sock, presence, claim = Rendezvous(base, NAME).join()
        if claim is not None:
            if chance.random() < 0.1:  # it dies before it has started any
                claim.close()
                sock.close()
                presence.leave()
                continue
            started.append(start(base, claim))
        with sock:
            stay(sock, chance)
        presence.leave()
        for process in started:
            process.poll()


def stay(sock: socket.socket, chance: random.Random) -> None:
    """Be connected for a while."""
    while pid := ask(sock):
        what = chance.random()
        if what < 0.02:
            os.kill(pid, signal.SIGKILL)
        elif what < 0.05:
            return
        elif what < 0.06:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            sock.send(b"?")
        except ConnectionError:
            return


def race(base: Path, servers: int, rounds: int, seed: int) -> None:
    """Have servers race; then wait until the last model process has ended."""
    for number in range(servers):
        if os.fork() == 0:
            come_and_go(base, rounds, servers * seed + number)
            os._exit(0)
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(servers)]
    assert set(codes) <= {0, -signal.SIGKILL}, codes
    meet_calmly(base)
    wait_dead(base)


def meet_calmly(base: Path) -> None:
    """Come and go once: what those have left that were killed is removed with that."""
    pid = 0
    started = []
    while not pid:  # the last of them may just be ending
        sock, presence, claim = Rendezvous(base, NAME).join()
        if claim is not None:
            started.append(start(base, claim))
        with sock:
            pid = ask(sock)
        presence.leave()
    for process in started:
        process.wait()


def wait_dead(base: Path) -> None:
    """Wait until no model process lives."""
    alive = os.open(f"{base}.alive", os.O_RDWR | os.O_CREAT)
    end = time.monotonic() + 30
    while True:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            assert time.monotonic() < end, "the model process lives on"
            time.sleep(0.005)


if __name__ == "__main__":
    _, role, path, *rest = sys.argv
    {"model": serve, "race": race}[role](Path(path), *map(int, rest))  # type: ignore[operator]
