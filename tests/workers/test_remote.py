"""The runner's side of a model in another process, whose part a thread plays here."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from contextvars import Context
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
import pytest

from asgi_infer import DeadlineExceeded, NativePolicy, NotReady, WorkerCrashed
from asgi_infer._call import Call, Departure, here
from asgi_infer._model import ModelReference
from asgi_infer.workers import RemoteError, RestartPolicy, _poison
from asgi_infer.workers import _remote as remote
from asgi_infer.workers._channel import Channel, Kind, Message
from asgi_infer.workers._errors_across import pack_error
from asgi_infer.workers._protocol import ModelSpec, Used
from asgi_infer.workers._remote import RemoteReplica, RemoteWorker

from ..calls import make_call
from ..gates import LIMIT
from .peers import Death, Peer, PeerLink

SPEC = ModelSpec(name="test", load=list, warmup=None, native=NativePolicy())


def echo(message: Message, peer: Peer) -> None:
    """Reply with the arguments."""
    peer.reply(message.body()[1], message)


def die(message: Message, peer: Peer) -> None:
    raise Death


def hang(message: Message, peer: Peer) -> None:
    assert peer.killed.wait(LIMIT)
    raise Death


def die_before_it_begins(message: Message, peer: Peer) -> None:
    peer.page.started = message.number - 1
    raise Death


def write_to_all(message: Message, peer: Peer) -> None:
    """Write to every descriptor, the channel's among them."""
    os.write(peer.channel.fileno(), b"x" * 200)
    hang(message, peer)


def fail(*args: object) -> None:
    raise MemoryError


Behaviour = Callable[[Message, Peer], object]


class PeerReplica(RemoteReplica):
    """A replica whose processes are peers.

    :param behaviours: of one process after the other; the last one is that of all that follow
    """

    def __init__(self, *behaviours: Behaviour, **options: Any) -> None:
        super().__init__(SPEC, RemoteWorker(**options))
        self.behaviours: Sequence[Behaviour] = behaviours
        self.links: list[PeerLink] = []
        self.losses = 0

    def _connect(self) -> PeerLink:
        behave, *left = self.behaviours
        self.behaviours = left or [behave]
        link = PeerLink(Peer(behave), SPEC)
        self.links.append(link)
        link.channel.send(Kind.OPEN)
        return link

    def start(self) -> PeerReplica:
        self.open(self.note_loss)
        return self

    def note_loss(self) -> None:
        self.losses += 1

    def call(self, func: Callable[..., Any], *args: Any) -> Any:
        return self.execute((func, args), Context())


Make = Callable[..., PeerReplica]


@pytest.fixture(autouse=True)
def nothing_has_crashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All replicas here are one runner's; what crashes in one test is not the next one's."""
    monkeypatch.setattr(_poison, "_poisons", WeakValueDictionary())


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes replicas that are open, and closes them in the end."""
    replicas: list[PeerReplica] = []

    def make_one(*behaviours: Behaviour, **options: Any) -> PeerReplica:
        replicas.append(PeerReplica(*behaviours, **options))
        return replicas[-1].start()

    yield make_one
    for replica in replicas:
        replica.close()


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Callable[[Call], None]:
    """Makes a call the one that runs on this thread."""

    def set_current(call: Call) -> None:
        monkeypatch.setattr(here, "current_call", lambda: call)

    return set_current


# -- calls -------------------------------------------------------------------------------------


def test_execute(make: Make) -> None:
    """A call is sent, and what comes back is its result."""
    assert make(echo).call(len, "a", 2) == ("a", 2)


def test_error(make: Make) -> None:
    """What is raised over there is raised here, with the traceback of that side as its cause."""

    def fail(message: Message, peer: Peer) -> None:
        peer.reply(pack_error(LookupError("no"), "over there"), message, Kind.RAISED)

    with pytest.raises(LookupError, match="no") as caught:
        make(fail).call(len)
    assert "over there" in str(caught.value.__cause__)


def test_error_that_can_not_be_sent(make: Make) -> None:
    """One that does not pickle is stood for by a ``RemoteError``."""

    class Local(Exception):
        pass

    def fail(message: Message, peer: Peer) -> None:
        peer.reply(pack_error(Local("no"), ""), message, Kind.RAISED)

    with pytest.raises(RemoteError, match="Local: no"):
        make(fail).call(len)


class Unreadable:
    """Pickles, and does not unpickle."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_result_that_does_not_unpickle(make: Make) -> None:
    """The error says where it comes from, and the next call runs."""

    def reply(message: Message, peer: Peer) -> None:
        peer.reply(Unreadable(), message)

    replica = make(reply, echo)
    with pytest.raises(ValueError, match="no number") as caught:
        replica.call(len)
    assert "result was unpickled" in caught.value.__notes__[0]
    assert replica.losses == 0


def test_what_does_not_pickle(make: Make) -> None:
    """The error says which function, and what to do; nothing is sent, and the next call runs."""
    replica = make(echo)
    with pytest.raises(TypeError, match=r"<lambda> and its arguments .* importable"):
        replica.call(lambda: None)
    assert replica.call(len, 1) == (1,)
    assert replica.losses == 0


def test_a_load_that_does_not_pickle(make: Make) -> None:
    """The error names what is to be importable: it is the first that who changes workers sees."""
    channel = make(echo).links[0].channel

    def encode(**parts: Any) -> None:
        parts = {"load": list, "warmup": None, "native": NativePolicy()} | parts
        remote.encode_spec(channel, ModelSpec(name="digits", **parts))

    with pytest.raises(TypeError, match=r"^load=.*<lambda> of 'digits' .* importable"):
        encode(load=lambda: 1)
    with pytest.raises(TypeError, match=r"^warmup=.*<lambda> of 'digits' .* importable"):
        encode(warmup=lambda model: None)
    with pytest.raises(TypeError, match=r"^NativePolicy.contexts of 'digits' .* importable"):
        encode(native=NativePolicy(contexts=(lambda: nullcontext(),)))


def test_no_memory_for_the_load(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system refuses is said as it is."""
    channel = make(echo).links[0].channel

    def fail(_: object) -> None:
        raise MemoryError("not so much")

    monkeypatch.setattr(channel, "encode", fail)
    with pytest.raises(MemoryError, match="not so much"):
        remote.encode_spec(channel, SPEC)


def test_no_memory_to_send_with(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system refuses is said as it is."""
    replica = make(echo)

    def fail(_: object) -> None:
        raise MemoryError("not so much")

    monkeypatch.setattr(replica.links[0].channel, "encode", fail)
    with pytest.raises(MemoryError, match="not so much"):
        replica.call(len)


def test_references(make: Make) -> None:
    """A reference goes as its path, and becomes one to the model over there."""

    def tell(message: Message, peer: Peer) -> None:
        peer.reply(repr(message.body()[1][0]), message)

    replica = make(tell)
    reference = ModelReference(SPEC, ("layers", "first"))
    assert replica.call(len, reference) == "runner.model.layers.first"
    with pytest.raises(ValueError, match="belongs to another runner"):
        replica.call(ModelReference(object(), ("predict",)))


def test_deadline_goes_along(make: Make, current: Callable[[Call], None]) -> None:
    """The other side knows when nobody waits any more."""

    def tell(message: Message, peer: Peer) -> None:
        peer.reply(message.deadline, message)

    replica = make(tell)
    current(make_call(deadline=12.5))
    assert replica.call(len) == 12.5


def test_notice(make: Make, current: Callable[[Call], None]) -> None:
    """When the caller leaves, before or after the request is sent, the page says so."""

    def tell(message: Message, peer: Peer) -> None:
        if message.number == 2:
            call.departure = Departure.CANCELLED
            replica.notice(call)
        peer.reply(peer.page.cancelled == message.number, message)

    replica, call = make(tell), make_call()
    current(call)
    assert replica.call(len) is False
    replica.notice(call)  # which does not run any more
    assert replica.call(len) is True
    assert replica.call(len) is True  # it had left before it was sent
    current(make_call())
    assert replica.call(len) is False


def test_others_are_no_notice(make: Make, current: Callable[[Call], None]) -> None:
    """Who leaves a call that others wait for, too, leaves it running."""

    def tell(message: Message, peer: Peer) -> None:
        replica.notice(make_call())
        replica.notice(call)  # of whose callers one has left, not all
        peer.reply(peer.page.cancelled, message)

    replica, call = make(tell), make_call()
    current(call)
    assert replica.call(len) == 0


def test_counts(make: Make) -> None:
    """What was used over there is known with each reply, and never goes back."""

    def use(message: Message, peer: Peer) -> None:
        peer.channel.send(Kind.RESULT, number=message.number, used=Used(3, 4, 0.5))

    replica = make(use, use)
    replica.call(len)
    assert replica.counted() == (3, 4, 0.5)
    assert replica.cpu_time() == 0.5
    replica.links[0].close()
    replica.call(len)
    assert len(replica.links) == 2
    assert replica.counted() == (6, 8, 1.0)


# -- crashes -----------------------------------------------------------------------------------


def test_crash(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The call that ran is told how its process ended; the next one runs in another."""
    replica = make(die, echo)
    replica.links[0].last_words = "Fatal: it was me"
    with pytest.raises(WorkerCrashed, match="SIGTEST while a call ran") as e:
        replica.call(len)
    assert "Fatal: it was me" in e.value.__notes__[0]
    assert (replica.losses, replica.lost) == (1, True)
    replica.open(replica.note_loss)
    assert not replica.lost
    assert replica.call(len, 1) == (1,)
    assert "SIGTEST" in caplog.text


def test_not_begun(make: Make) -> None:
    """A process that dies before it begins takes no call with it: that is sent again."""
    replica = make(die_before_it_begins, echo)
    assert replica.call(len, 1) == (1,)
    assert (replica.losses, len(replica.links), replica.restarts.crashes) == (1, 2, 1)


def test_never_begun(make: Make) -> None:
    """One that nobody ever begins with is given up, and may be repeated."""
    replica = make(die_before_it_begins)
    with pytest.raises(NotReady, match="died 3 times before it began with len"):
        replica.call(len)


def test_too_many_die_before_they_begin(make: Make) -> None:
    """Calls that are sent again start no more processes than the policy bears."""
    policy = RestartPolicy(max_restarts=1)
    replica = make(die_before_it_begins, restart=policy)
    with pytest.raises(NotReady, match="has died too often") as caught:
        replica.call(len)
    assert len(replica.links) == 2
    assert (caught.value.retry_after or 0) >= policy.recover_after
    assert replica.restarts.broken


def test_gone_before_it_is_sent(make: Make) -> None:
    """A process that has gone while nobody looked is noticed when something is to be sent."""
    replica = make(echo)
    link = replica.links[0]
    link.kill()
    link.peer.thread.join(LIMIT)
    assert replica.call(len, 1) == (1,)
    assert replica.losses == 1


def test_reply_before_death(make: Make) -> None:
    """What a process had to say before it died counts."""

    def reply_and_die(message: Message, peer: Peer) -> None:
        peer.reply("last", message)
        raise Death

    replica = make(reply_and_die)
    assert replica.call(len) == "last"
    assert replica.losses == 0


def test_what_is_no_message(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A process that has written to its channel by itself is ended, and the next call gets its
    own reply."""
    replica = make(write_to_all, echo)
    with pytest.raises(WorkerCrashed):
        replica.call(len)
    assert "is killed: this is not the start of a message" in caplog.text
    assert replica.call(len, 1) == (1,)


def test_what_is_no_message_of_an_idle_process(make: Make) -> None:
    """Likewise when nothing runs: it is no end of the thread."""
    replica = make(echo)
    os.write(replica.links[0].peer.channel.fileno(), b"x" * 200)
    assert not replica.wake_up.acquire(timeout=LIMIT)
    assert replica.lost
    assert replica.call(len, 1) == (1,)


def test_reply_to_another_request(make: Make) -> None:
    """A reply that is not to the request is nobody's."""

    def answer_twice(message: Message, peer: Peer) -> None:
        echo(message, peer)
        peer.channel.send(Kind.RESULT, number=message.number)

    replica = make(answer_twice)
    assert replica.call(len, 1) == (1,)
    assert replica.call(len, 2) == (2,)


def test_failure_while_waiting(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the reply is not waited for, for whatever reason, the next call does not get it."""
    replica = make(echo)
    with monkeypatch.context() as patch:
        patch.setattr(replica, "_receive", fail)
        with pytest.raises(MemoryError):
            replica.call(len, 1)
    assert replica.lost
    assert replica.call(len, 2) == (2,)


def test_end_held_open(make: Make) -> None:
    """A process that has died is dead, also if somebody else holds its end of the channel."""

    def die_silently(message: Message, peer: Peer) -> None:
        held = _Held(peer.channel)
        peer.channel = cast("Channel", held)
        others.append(held)
        raise Death

    others: list[_Held] = []
    with pytest.raises(WorkerCrashed):
        make(die_silently, echo).call(len)
    others[0].let_go()


class _Held:
    """A channel that is not closed with its peer."""

    def __init__(self, channel: Any) -> None:
        self.let_go = channel.close

    def close(self) -> None:
        pass


def test_retry(make: Make) -> None:
    """With ``retry_crashed`` a call is run again, once."""
    replica = make(die, echo, retry_crashed=True)
    assert replica.call(len, 1) == (1,)
    replica.behaviours = [die]
    replica.links[-1].close()
    with pytest.raises(WorkerCrashed):
        replica.call(len, 2)
    assert len(replica.links) == 4


def test_retry_without_a_process(make: Make) -> None:
    """If the model does not load again, the caller learns of the crash, and of no other error."""

    def fail(replica: PeerReplica) -> PeerLink:
        raise OSError("no processes any more")

    replica = make(die, retry_crashed=True)
    replica._connect = lambda: fail(replica)  # type: ignore[method-assign]
    with pytest.raises(WorkerCrashed, match="SIGTEST"):
        replica.call(len)
    with pytest.raises(NotReady, match="did not load again: OSError: no processes any more"):
        replica.call(len)


def test_poison(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A call that has crashed two processes is not run again, which is logged once; others are."""

    def die_of_arrays(message: Message, peer: Peer) -> None:
        (array,) = message.body()[1]
        if array[0]:
            raise Death
        peer.reply(None, message)

    replica = make(die_of_arrays)
    bad, good = np.ones(5000), np.zeros(5000)
    for _ in range(2):
        with pytest.raises(WorkerCrashed, match="SIGTEST"):
            replica.call(len, bad)
    for _ in range(2):
        with pytest.raises(WorkerCrashed, match=r"has crashed .* 2 times, and is not run again"):
            replica.call(len, bad.copy())
    assert caplog.text.count("is not run again for 600 s") == 1
    assert replica.call(len, good) is None
    assert len(replica.links) == 3


# -- time --------------------------------------------------------------------------------------


def test_hard_timeout(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A call that runs for too long is killed, with its process, which says what it was doing.
    Its name is in the log, since its caller may have left."""
    replica = make(hang, echo, hard_timeout=0.01)
    with pytest.raises(DeadlineExceeded, match=r"longer than hard_timeout \(0.01 s\)") as caught:
        replica.call(len)
    assert caught.value.started
    assert (replica.losses, replica.links[0].dumped) == (1, 1)
    assert caplog.messages == [str(caught.value)]
    assert replica.call(len, 1) == (1,)


def test_a_long_time(make: Make) -> None:
    """A limit may be longer than the system can wait at once."""
    assert make(echo, hard_timeout=1e9, startup_timeout=1e9).call(len, 1) == (1,)


def test_hard_timeout_of_one_that_writes_without_end(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process writes does not put its end off, neither before the limit nor after it."""
    replica = make(hang, echo, hard_timeout=0.01)
    noisy = _Noise()
    monkeypatch.setattr(PeerLink, "watched", property(lambda _: (noisy.fileno(),)))
    monkeypatch.setattr(remote, "_LONGEST", 0.01)
    replica._descriptors = None  # it asks again
    with pytest.raises(DeadlineExceeded):
        replica.call(len)
    monkeypatch.undo()
    noisy.close()
    assert replica.links[0].peer.killed.is_set()


def test_startup_timeout() -> None:
    """A model that takes too long to load is not waited for."""

    class Slow(PeerReplica):
        def _connect(self) -> PeerLink:
            self.links.append(PeerLink(Peer(hang), SPEC))
            self.links[-1].channel.send(Kind.EXECUTE)
            return self.links[-1]

    replica = Slow(hang, startup_timeout=0.01)
    with pytest.raises(NotReady, match=r"did not load in 0.01 s \(startup_timeout\)"):
        replica.start()
    assert replica.lost
    replica.close()


@pytest.mark.parametrize("name", ["hard_timeout", "startup_timeout"])
def test_no_time(name: str) -> None:
    """Seconds are seconds."""
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=name):
        RemoteWorker(**options)


# -- interruption ------------------------------------------------------------------------------


def interrupt_soon(replica: RemoteReplica, until: threading.Event) -> threading.Thread:
    def interrupt() -> None:
        assert until.wait(LIMIT)
        replica.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


def test_interrupt(make: Make) -> None:
    """When nobody waits any more, the process is killed in the middle of its call."""

    def begin(message: Message, peer: Peer) -> None:
        begun.set()
        hang(message, peer)

    begun = threading.Event()
    replica = make(begin, retry_crashed=True)
    thread = interrupt_soon(replica, begun)
    with pytest.raises(WorkerCrashed, match="the runner was stopped"):
        replica.call(len)
    thread.join(LIMIT)
    assert replica.links[0].peer.killed.is_set()
    assert not replica.wake_up.acquire()  # nor does it sleep any more


def test_interrupt_while_loading() -> None:
    """A model that is not wanted any more is not loaded to the end."""
    replica = PeerReplica(echo)
    replica.interrupt()
    with pytest.raises(NotReady, match="stopped while its model 'test' was loaded"):
        replica.start()
    replica.close()


def test_interrupt_as_the_thread_falls_asleep(make: Make) -> None:
    """A latch that was released says so, interrupted or not: whoever sleeps on it, and knows that
    it has been, would ask for ever. One that was not lets go."""
    replica = make(echo)
    replica.wake_up.release()
    replica.interrupt()
    assert replica.wake_up.acquire()
    assert not replica.wake_up.acquire()


def test_interrupt_while_closing(make: Make) -> None:
    """A model whose destruction hangs is not waited for."""
    replica = make(echo)
    replica.interrupt()
    replica.close()
    replica.interrupt()  # too late, and no harm


def test_close_fails() -> None:
    """What a destructor raises over there is raised here, and the process ends."""

    class Failing(PeerReplica):
        def _ask(self, link: Any, kind: Kind, *args: Any, **options: Any) -> Message:
            return super()._ask(link, Kind.EXECUTE, *args, **options)  # as a peer that answers

    def fail(message: Message, peer: Peer) -> None:
        peer.reply(pack_error(LookupError("stuck"), ""), message, Kind.RAISED)

    replica = Failing(fail)
    replica.start()
    with pytest.raises(LookupError, match="stuck"):
        replica.close()
    assert replica.lost


def test_one_that_does_not_end_by_itself(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    """A process that has said good-bye and stays is ended."""
    monkeypatch.setattr(remote, "_FAREWELL", 0.0)
    replica = make(echo)
    monkeypatch.setattr(replica.links[0], "attend", lambda: True)
    replica.close()
    assert replica.links[0].peer.killed.is_set()


# -- streams -----------------------------------------------------------------------------------


class Numbers:
    """A peer that makes numbers, and notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Kind] = []
        self.left = 2

    def __call__(self, message: Message, peer: Peer) -> None:
        self.asked.append(message.kind)
        assert message.stream == 1
        if message.kind is Kind.NEXT:
            self.left -= 1
            kind = Kind.RESULT if self.left >= 0 else Kind.END
            peer.reply(self.left if self.left >= 0 else None, message, kind)
        else:
            peer.reply(None, message)


def test_stream(make: Make) -> None:
    """A generator is begun, stepped and closed over there."""
    numbers = Numbers()
    steps: Any = make(numbers).iterate((range, (2,)), Context())
    assert [next(steps), next(steps)] == [1, 0]
    with pytest.raises(StopIteration):
        next(steps)
    steps.close()
    assert numbers.asked == [Kind.ITERATE, Kind.NEXT, Kind.NEXT, Kind.NEXT, Kind.CLOSE]


def test_stream_of_a_process_that_has_died(make: Make) -> None:
    """A generator is gone with its process: nobody takes up where it was."""
    replica = make(Numbers(), echo)
    steps: Any = replica.iterate((range, (2,)), Context())
    replica.links[0].close()
    with pytest.raises(WorkerCrashed, match="SIGTEST"):
        next(steps)
    assert replica.call(len, 1) == (1,)
    with pytest.raises(WorkerCrashed, match="the process in which this stream ran has died"):
        next(steps)
    steps.close()


# -- idle --------------------------------------------------------------------------------------


def test_sleep(make: Make) -> None:
    """Its thread sleeps until it is woken, or the time is up."""
    replica = make(echo)
    replica.wake_up.release()
    assert replica.wake_up.acquire()
    assert not replica.wake_up.acquire(timeout=0.001)


def test_death_of_an_idle_process(make: Make) -> None:
    """A process that dies while nothing runs is noticed at once: its thread wakes up."""
    replica = make(echo)
    threading.Thread(target=replica.links[0].kill).start()
    assert not replica.wake_up.acquire()
    assert (replica.losses, replica.lost) == (1, True)
    assert not replica.wake_up.acquire(timeout=0.001)  # it sleeps without one, too
    assert replica.losses == 1


def test_what_an_idle_process_writes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else wants attention gets it, and the thread sleeps on."""
    replica = make(echo)
    link = replica.links[0]
    attended = 0

    def attend() -> bool:
        nonlocal attended
        attended += 1
        if attended == 3:
            replica.wake_up.release()
        return True

    monkeypatch.setattr(link, "attend", attend)
    monkeypatch.setattr(PeerLink, "watched", property(lambda _: (noisy.fileno(),)))
    noisy = _Noise()
    replica._descriptors = None  # it asks again
    assert replica.wake_up.acquire(timeout=LIMIT)
    assert attended >= 3
    noisy.close()
    monkeypatch.undo()


class _Noise:
    """A descriptor on which there always is something."""

    def __init__(self) -> None:
        self._ends = socket.socketpair()
        self._ends[1].send(b"noise")
        self.fileno = self._ends[0].fileno

    def close(self) -> None:
        for end in self._ends:
            end.close()


def test_leave_behind(make: Make) -> None:
    """A forked child lets go of its copy of the channel, so that the process notices its end."""
    replica = make(echo)
    replica.leave_behind()
    replica.links[0].peer.thread.join(LIMIT)
    assert not replica.links[0].peer.thread.is_alive()


def test_leave_nothing_behind() -> None:
    """There may be nothing to let go of."""
    replica = PeerReplica(echo, restart=RestartPolicy(max_restarts=0))
    replica.leave_behind()
    replica.close()
    assert replica.restarts.note() == RestartPolicy().recover_after


def test_clock() -> None:
    """Deadlines are on the clock that all processes of a machine share."""
    assert here.clock() - time.monotonic() < 1.0
