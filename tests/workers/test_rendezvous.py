"""Processes find their model process or start it: one at every moment, and no files at the end.

Locks belong to open files, so that one process can be all parties; only races need several.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from asgi_infer.native import processes
from asgi_infer.workers import _rendezvous
from asgi_infer.workers._rendezvous import Claim, Rendezvous, default_base, deployment

from . import meeting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="locks and sockets as on Linux")

ROOT = Path(__file__).parent.parent.parent
NAME = meeting.NAME


class Party:
    """Everybody who joins in a test; what they hold is closed when it ends."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.stack = ExitStack()

    def join(self, name: str = NAME, timeout: float = 10.0) -> socket.socket:
        """Join as one who has to find the model process."""
        sock, presence, claim = Rendezvous(self.base, name).join(timeout)
        self.stack.enter_context(sock)
        self.stack.callback(presence.leave)
        assert claim is None
        return sock

    def claim(self, name: str = NAME) -> tuple[socket.socket, Claim]:
        """Join as one who has to start it."""
        sock, presence, claim = Rendezvous(self.base, name).join()
        self.stack.enter_context(sock)
        self.stack.callback(presence.leave)
        assert claim is not None
        return sock, claim

    def accept(self, claim: Claim) -> socket.socket | None:
        """Accept as the model process."""
        sock = claim.accept()
        return None if sock is None else self.stack.enter_context(sock)


@pytest.fixture
def base() -> Iterator[Path]:
    """Of a short path, for the socket's must be short."""
    with tempfile.TemporaryDirectory(prefix="rendezvous-") as directory:
        yield Path(directory, "base")


@pytest.fixture
def party(base: Path) -> Iterator[Party]:
    joiners = Party(base)
    with joiners.stack:
        yield joiners


def locked(directory: Path) -> ExitStack:
    """Lock a directory, until what is returned is closed."""
    fd = os.open(directory, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    holding = ExitStack()
    holding.callback(os.close, fd)
    return holding


def die(claim: Claim) -> None:
    """What the kernel does when the model process dies."""
    claim.close()


# -- joining -----------------------------------------------------------------------------------


def test_first_claims_and_others_connect(party: Party) -> None:
    """The first has to start the model process; the others reach it, in the order they came."""
    first, claim = party.claim()
    others = [party.join() for _ in range(3)]
    for number, sock in enumerate([first, *others]):
        end = party.accept(claim)
        assert end is not None
        end.send(bytes([number]))
        assert sock.recv(1) == bytes([number])
    assert party.accept(claim) is None
    die(claim)


def test_private(party: Party, base: Path) -> None:
    """Nobody else gets near the socket."""
    _, claim = party.claim()
    for directory in (base, base / NAME):
        assert directory.stat().st_mode & 0o777 == 0o700
    assert (base / NAME / "socket").is_socket()
    die(claim)


def test_claim_lasts_while_the_model_process_lives(party: Party) -> None:
    """The starter closes its own descriptors, and those that were inherited hold the claim."""
    _, claim = party.claim()
    listener, lock = map(os.dup, claim.fds)
    die(claim)
    inherited = Claim.inherited(listener, lock)
    assert not any(os.get_inheritable(fd) for fd in inherited.fds)
    party.join()
    assert party.accept(inherited) is not None
    die(inherited)
    die(party.claim()[1])


def test_death_ends_all_connections_and_frees_the_claim(party: Party) -> None:
    """Who waits for a model process that dies is told, accepted or not, and may start the next."""
    first, claim = party.claim()
    accepted = party.accept(claim)
    assert accepted is not None
    waiting = party.join()
    accepted.close()
    die(claim)
    assert first.recv(1) == b""
    with pytest.raises(ConnectionResetError):
        waiting.recv(1)
    die(party.claim()[1])


def test_deployments_are_apart(party: Party) -> None:
    """Each deployment has a model process of its own."""
    claims = [party.claim(name)[1] for name in (16 * "1", 16 * "2")]
    for claim in claims:
        die(claim)


# -- leaving -----------------------------------------------------------------------------------


def test_withdrawn_files_are_gone(party: Party, base: Path) -> None:
    """The model process that ends removes the files; the base stays."""
    _, claim = party.claim()
    claim.withdraw()
    assert list(base.iterdir()) == []
    claim.close()


def test_nobody_claims_before_the_end(party: Party) -> None:
    """The files are gone, but the process is not: whoever comes waits for its end."""
    _, claim = party.claim()
    claim.withdraw()
    with pytest.raises(TimeoutError, match=r"has held the lock of .*: look with lslocks"):
        party.join(timeout=0)
    claim.close()
    die(party.claim()[1])


def test_withdrawing_in_vain(party: Party, base: Path) -> None:
    """Where the gate does not open, the files stay for the next to remove."""
    _, claim = party.claim()
    with locked(base), pytest.raises(TimeoutError):
        claim.withdraw(timeout=0)
    claim.close()
    assert (base / NAME / "socket").exists()


def test_withdrawing_leaves_alone_what_is_anothers(party: Party, base: Path) -> None:
    """Somebody has removed the files, and there is a new model process: its files stay."""
    _, old = party.claim()
    shutil.rmtree(base)
    _, new = party.claim()
    old.withdraw()
    old.close()
    party.join()
    die(new)


def test_stale_files_are_swept(party: Party, base: Path) -> None:
    """What killed processes have left goes with the next start; what lives or isn't ours stays."""
    dead, alive, strange = 16 * "d", 16 * "a", 16 * "5"
    for name in (NAME, dead):
        die(party.claim(name)[1])
    _, living = party.claim(alive)
    (base / strange).mkdir()
    (base / strange / "notes").touch()
    (base / "other").mkdir()
    _, claim = party.claim()
    assert {path.name for path in base.iterdir()} == {NAME, alive, strange, "other"}
    die(claim)
    die(living)


def test_owner(party: Party, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not answered can tell which process has the model, once that has signed. Another one
    that has got its number by now is not taken for it."""
    _, claim = party.claim()
    rendezvous = Rendezvous(base, NAME)
    assert rendezvous.owner() is None
    claim.sign()
    fd = rendezvous.owner()
    assert fd is not None
    assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{fd}").read_text()
    os.close(fd)
    monkeypatch.setattr(processes, "start_time", lambda pid: 0)
    assert rendezvous.owner() is None
    die(claim)


def test_signing_in_vain(party: Party, base: Path) -> None:
    """Where the files are gone nobody knows the process, and nothing else is amiss."""
    _, claim = party.claim()
    shutil.rmtree(base)
    claim.sign()
    assert Rendezvous(base, NAME).owner() is None
    die(claim)


def test_last_to_leave(base: Path) -> None:
    """Of the servers that leave, the last one learns that it is."""
    rendezvous = Rendezvous(base, NAME)
    first, second, third = (rendezvous.join() for _ in range(3))
    for joined in (first, second, third):
        joined.sock.close()
    assert not second.presence.leave()
    assert not first.presence.leave()
    assert third.presence.leave()
    assert first.claim is not None
    die(first.claim)


def test_tidy(party: Party, base: Path) -> None:
    """A server that leaves removes what a killed model process has left, and nothing else."""
    _, claim = party.claim()
    rendezvous = Rendezvous(base, NAME)
    rendezvous.tidy()
    assert (base / NAME / "socket").exists()
    die(claim)
    for _ in range(2):  # also if others have done it
        rendezvous.tidy()
        assert list(base.iterdir()) == []


# -- what is in the way ------------------------------------------------------------------------


def test_locked_and_nobody_there(party: Party, base: Path) -> None:
    """A lock without a socket is a process that is just ending; if it never does, that is said."""
    _, claim = party.claim()
    (base / NAME / "socket").unlink()
    with pytest.raises(TimeoutError, match="nobody answers there: look with lslocks"):
        party.join(timeout=0)
    die(claim)


def test_locked_for_a_moment(party: Party, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes between the end of the socket and that of the lock tries again."""
    _, claim = party.claim()
    (base / NAME / "socket").unlink()
    monkeypatch.setattr(time, "sleep", lambda pause: die(claim))
    die(party.claim()[1])


def test_gate_held_for_a_moment(party: Party, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds the gate closed tries again."""
    base.mkdir(0o700)
    holding = locked(base)
    monkeypatch.setattr(time, "sleep", lambda pause: holding.close())
    die(party.claim()[1])


def test_gate_removed_meanwhile(party: Party, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a directory that is not there any more counts for nothing: the new one does."""
    try_lock = _rendezvous._try_lock
    removals = [base]

    def remove_and_lock(fd: int) -> bool:
        if removals:
            shutil.rmtree(removals.pop())
        return try_lock(fd)

    monkeypatch.setattr(_rendezvous, "_try_lock", remove_and_lock)
    die(party.claim()[1])
    assert (base / NAME).exists()


def test_failure_gives_the_claim_back(
    party: Party, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can't listen leaves the way free."""
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "listen", lambda *args: os.open("/nowhere", os.O_RDONLY))
        with pytest.raises(FileNotFoundError):
            party.claim()
    die(party.claim()[1])


def test_path_too_long(tmp_path: Path) -> None:
    """A Unix socket's path is short, and the message says how to get one."""
    Rendezvous(Path("/" + 82 * "x"), NAME)
    with pytest.raises(ValueError, match=r"has 108 bytes.*directory=\.\.\.\) a shorter path"):
        Rendezvous(Path("/" + 83 * "x"), NAME)


def make_open(base: Path) -> None:
    base.mkdir()
    base.chmod(0o750)


def make_file(base: Path) -> None:
    base.touch(0o700)


def make_link(base: Path) -> None:
    (base.parent / "target").mkdir(0o700)
    base.symlink_to(base.parent / "target")


@pytest.mark.parametrize("make", [make_open, make_file, make_link])
def test_base_that_is_not_private(party: Party, base: Path, make: Callable[[Path], None]) -> None:
    """A directory that others may enter, or have put there, is refused."""
    make(base)
    with pytest.raises(PermissionError, match=r"belongs to user .* chmod 700.* or pass"):
        party.claim()


def test_base_that_cannot_be_made(tmp_path: Path) -> None:
    """The error keeps its class, and names the place and what to do."""
    base = tmp_path / "missing" / "base"
    with pytest.raises(FileNotFoundError, match=r"missing/base.*SharedWorker\(directory"):
        Rendezvous(base, "0" * 16).join()


def test_base_of_another_user(party: Party, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of another user's is refused, private or not."""
    base.mkdir(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        party.claim()


def test_model_process_of_another_user(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the user's own processes are talked to: not even the superuser's."""
    _, claim = party.claim()
    monkeypatch.setattr(_rendezvous, "_open_private", lambda path: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="run all processes of a deployment as one user"):
        party.join()
    die(claim)


def test_server_of_another_user(
    party: Party, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model process hangs up on other users' processes, and serves the next."""
    user = os.geteuid()
    users = iter([12345, 12345, user])  # the first is read once more for the message
    first, claim = party.claim()
    second = party.join()
    monkeypatch.setattr(os, "geteuid", lambda: next(users))
    accepted = party.accept(claim)
    assert accepted is not None
    accepted.send(b"x")
    assert first.recv(1) == b""
    assert second.recv(1) == b"x"
    assert "refused a connection: process" in caplog.text
    monkeypatch.undo()
    die(claim)


def test_forked_child_has_no_claim(party: Party) -> None:
    """What the model's libraries fork does not keep the claim when the model process dies."""
    _, claim = party.claim()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if child == 0:
            ours.close()
            theirs.send(b"x")
            theirs.recv(1)  # until the parent closes the other end
            os._exit(0)
        ours.recv(1)
        die(claim)
        die(party.claim()[1])
    os.waitpid(child, 0)


def test_all_claims_are_given_up(party: Party) -> None:
    """That is what the child does after a fork."""
    names = [16 * "1", 16 * "2"]
    for name in names:
        party.claim(name)
    _rendezvous._close_claims()
    for name in names:
        die(party.claim(name)[1])


# -- names -------------------------------------------------------------------------------------


def load() -> None: ...


class Loader:
    def __call__(self) -> None: ...


def test_name_of_a_deployment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Same server, code, place, runner and function: same name. All else has another."""
    names = [
        deployment("a", load, server=True),
        deployment("b", load, server=True),
        deployment("a", load, server=False),
        deployment("a", Loader(), server=False),
        deployment("a", load, Loader(), server=True),
    ]
    assert deployment("a", load, server=True) == names[0]
    assert deployment("a", functools.partial(load), server=True) == names[0]
    monkeypatch.chdir(tmp_path)
    names.append(deployment("a", load, server=False))
    monkeypatch.setattr(processes, "server", lambda: os.getppid() + 1)
    names.append(deployment("a", load, server=True))
    assert len(set(names)) == 7
    assert all(_rendezvous._NAME.fullmatch(name) for name in names)


def test_name_where_the_directory_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A current directory that was removed is no reason to fail."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert deployment("a", load, server=False)


def test_default_base() -> None:
    """One for each user, where temporary files are."""
    assert default_base() == Path(tempfile.gettempdir(), f"asgi_infer-{os.geteuid()}")


# -- races -------------------------------------------------------------------------------------


def race(base: Path, *, servers: int, rounds: int, seed: int) -> int:
    """How many model processes there were, one after the other."""
    arguments = map(str, (base, servers, rounds, seed))
    command = [sys.executable, "-m", "tests.workers.meeting", "race", *arguments]
    subprocess.run(command, check=True, timeout=600, cwd=ROOT)
    assert not Path(f"{base}.two").exists()
    assert list(base.iterdir()) == []
    return Path(f"{base}.started").stat().st_size


def test_one_model_process_at_every_moment(base: Path) -> None:
    """Servers come, go, and are killed, and so is the model process: there are never two, and the
    last leaves no files."""
    assert race(base, servers=4, rounds=2, seed=0) >= 1


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10))
def test_one_model_process_for_long(base: Path, seed: int) -> None:
    """The same with more servers, for longer."""
    assert race(base, servers=8, rounds=30, seed=seed) > 10
