"""Objects to bytes and back: what arrives is equal, and arrays are not copied on arrival."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from asgi_infer.workers import _codec
from asgi_infer.workers._arrays import THRESHOLD
from asgi_infer.workers._codec import INLINE, Encoded, Encoder, decode, loads, main_here
from asgi_infer.workers._segments import Lease, Mapped, Segments

LARGE = THRESHOLD
"""Items of an array that is large enough, whatever they are."""


class Wire:
    """Both sides of a channel, without a socket."""

    def __init__(
        self, dispatch: Any = MappingProxyType({}), main: Callable[[], str] = main_here
    ) -> None:
        self.segments = Segments()
        self.mapped = Mapped()
        self.encoder = Encoder(self.segments, dispatch)
        self.main = main

    def deliver(self, encoded: Encoded) -> Any:
        layout, descriptor = encoded.layout, encoded.descriptor
        main = self.main if encoded.asks_main else None
        if layout is None:
            return decode(encoded.inline, main)
        if descriptor is not None:
            self.mapped.add(layout.segment, descriptor, layout.size)
            assert encoded._segment is not None
            encoded._segment.descriptor = None
        encoded.sent()
        return decode(encoded.inline, main, layout, self.mapped.lease(layout.segment, layout.end))

    def __call__(self, body: object) -> Any:
        return self.deliver(self.encoder.encode(body))


def owner(array: Any) -> Any:
    """What the memory of an array belongs to."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


def assert_same(got: Any, sent: Any) -> None:
    """Equal in all that can be seen of an array."""
    assert type(got) is type(sent)
    assert got.dtype == sent.dtype
    assert got.shape == sent.shape
    assert got.flags.writeable == sent.flags.writeable
    assert got.flags.aligned
    assert got.tobytes() == sent.tobytes() or got.dtype.hasobject
    np.testing.assert_array_equal(got, sent)


# -- arrays ------------------------------------------------------------------------------------

NUMBERS = np.arange(LARGE).reshape(64, -1)
STRUCTURE = np.dtype([("a", "<f4"), ("b", ">i8"), ("c", "S3", (2,))], align=True)

SHARED = {
    "plain": NUMBERS,
    "Fortran": np.asfortranarray(NUMBERS),
    "transposed": NUMBERS.reshape(4, 16, -1).transpose(1, 2, 0),
    "backwards": NUMBERS[::-1, ::-1],
    "every second": NUMBERS[:, ::2],
    "broadcast": np.broadcast_to(np.arange(7.0), (LARGE, 7)),
    "16 bits": NUMBERS.astype(np.float16),
    "other end first": NUMBERS.astype(">f8"),
    "complex": NUMBERS * 1j,
    "truths": np.ones(LARGE, bool),
    "dates": NUMBERS.astype("M8[us]"),
    "dates, other end first": NUMBERS.astype(">M8[us]"),
    "durations": NUMBERS.astype("m8[3h]"),
    "text": np.array(["text"] * LARGE),
    "bytes": np.array([b"text"] * LARGE),
    "structure": np.zeros(LARGE, STRUCTURE),
    "void": np.zeros(LARGE, "V5"),
    "no dimension": np.array(b"x" * LARGE),
    "metadata": NUMBERS.astype(np.dtype("i8", metadata={"unit": 1})),
    "long long": NUMBERS.astype(np.longlong),
}
SHARED["read-only"] = NUMBERS.copy()
SHARED["read-only"].flags.writeable = False


@pytest.mark.parametrize("array", SHARED.values(), ids=list(SHARED))
def test_shared(array: Any) -> None:
    """Arrays arrive as they were, and lie in shared memory."""
    got = Wire()({"array": array})["array"]
    assert_same(got, array)
    assert isinstance(owner(got), Lease)
    assert got.flags.f_contiguous == array.flags.f_contiguous or not array.flags.forc


def with_objects() -> Any:
    return np.array([({"a": 1}, 2)] * LARGE, dtype=[("a", "O"), ("b", "i4")])


class Plain(np.ndarray[Any, Any]):
    """A subclass that adds nothing."""


STREAMED = {
    "empty": np.zeros((0, 5)),
    "no bytes": np.zeros(LARGE, "V0"),
    "none": np.array(1.5),
    "small": np.arange(10),
    "small and backwards": np.arange(10)[::-1],
    "objects": np.array([{"a": 1}] * LARGE),
    "structure of objects": with_objects(),
    "masked": np.ma.masked_greater(NUMBERS, 5),
    "matrix": np.ones((64, 64)).view(np.matrix),
    "subclass": NUMBERS.view(Plain),
}


@pytest.mark.parametrize("array", STREAMED.values(), ids=list(STREAMED))
def test_streamed(array: Any) -> None:
    """What is small, or more than memory, arrives too, as pickle does it."""
    assert_same(Wire()([array])[0], array)


def test_memory_map(tmp_path: Path) -> None:
    """So does an array that lies in a file."""
    array = np.memmap(tmp_path / "array", np.int64, "w+", shape=(LARGE,))
    array[:] = np.arange(LARGE)
    np.testing.assert_array_equal(Wire()(array), array)
    del array


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="NumPy 2 has it")
def test_strings_of_any_length() -> None:
    """Texts of variable length lie elsewhere than in their array."""
    array = np.array(["a", "b" * 100] * LARGE, dtype=np.dtypes.StringDType())
    np.testing.assert_array_equal(Wire()(array), array)


def test_generator() -> None:
    """A random generator goes on where it was."""
    generator = np.random.default_rng(7)
    got = Wire()(generator)
    assert got.integers(1000) == generator.integers(1000)


def test_same_array_twice() -> None:
    """One array that stands in two places is one array on arrival, and is sent once."""
    array = np.zeros(LARGE)
    wire = Wire()
    encoded = wire.encoder.encode([array, array, array[1:]])
    assert encoded.layout is not None
    assert encoded.layout.buffers == 2
    got = wire.deliver(encoded)
    assert got[0] is got[1]


def test_written_in_place() -> None:
    """What arrives is the receiver's: written to, it changes nothing here, and it is not written
    over as long as any part of it is alive."""
    wire = Wire()
    sent = np.zeros(LARGE)
    kept = wire([sent, sent + 1])[1][5:10]
    kept += 1
    for _ in range(3):
        wire(np.full((2, LARGE), 7.0))
    assert kept.tolist() == [2.0] * 5
    assert sent[5] == 0
    del kept
    before = wire.segments.made
    wire([sent, sent])
    assert wire.segments.made == before == 2


def test_one_copy_there_and_none_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of an array is written once, however it lies, and never read into a copy."""
    copies: list[None] = []
    copyto = np.copyto
    monkeypatch.setattr(np, "copyto", lambda *args: copies.append(copyto(*args)))
    wire = Wire()
    got = wire([NUMBERS, NUMBERS.T[::2], SHARED["broadcast"]])
    assert len(copies) == 3
    assert [type(array.base) for array in got] == [np.ndarray] * 3  # all bytes of the message
    assert got[0].base is got[1].base is got[2].base
    memory = np.frombuffer(owner(got[0]).memory.map, np.uint8)
    assert all(np.shares_memory(array, memory) for array in got)


def test_segment_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that is larger than all memory fails alone, and the next message arrives."""
    wire = Wire()
    with pytest.raises(MemoryError, match="send less in one call"):
        wire(np.broadcast_to(np.float64(0), 2**50))
    assert wire([1]) == [1]
    assert len(wire.segments) == 0


# -- nested ------------------------------------------------------------------------------------


@dataclass
class Box:
    """What a user's dataclass would be."""

    content: Any


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        # NumPy itself pickles dates in the native byte order, whatever theirs was.
        native = one.dtype.newbyteorder("=")
        alike = one.shape == other.shape and other.dtype.newbyteorder("=") == native
        return alike and bool(one.astype(native).tobytes() == other.astype(native).tobytes())
    if isinstance(one, Box):
        return type(other) is Box and same(one.content, other.content)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return type(one) is type(other) and all(same(*pair) for pair in pairs)
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and bool(one == other)


ARRAYS = arrays_of.arrays(
    dtype=arrays_of.scalar_dtypes(), shape=arrays_of.array_shapes(max_dims=3, max_side=4)
).flatmap(lambda array: st.sampled_from([array, np.resize(array, (2, LARGE)).T]))
LEAVES = st.none() | st.integers() | st.floats() | st.text() | st.binary() | ARRAYS
BODIES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(Box, inner)
    ),
    max_leaves=6,
)


@settings(max_examples=30)
@given(BODIES)
def test_nested(body: Any) -> None:
    """Whatever arrays are nested in arrives as it was."""
    assert same(_wire(body), body)


_wire = Wire()  # one for all examples: making segments takes longer than using them


# -- what else has memory ----------------------------------------------------------------------


class Exporting:
    """Offers its memory to pickle, as a data frame does."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Exporting, (pickle.PickleBuffer(self.memory),)


@pytest.mark.parametrize("make", [bytes, bytearray])
@pytest.mark.parametrize("size", [0, 10, LARGE, 50 * LARGE])
def test_exported(make: Callable[[bytes], Any], size: int) -> None:
    """Large buffers lie in shared memory, and are as writeable as they were."""
    memory = make(bytes(range(256)) * (size // 256 + 1))
    got = Wire()([Exporting(memory), Exporting(memory)])[1].memory
    assert bytes(got) == bytes(memory)
    assert memoryview(got).readonly is (make is bytes)
    shared = isinstance(memoryview(got).obj, np.ndarray)
    assert shared is (len(memory) >= THRESHOLD)


@pytest.mark.parametrize(
    "body",
    [
        b"\xff" * 10 * INLINE,
        bytearray(b"\xff" * 10 * INLINE),
        "text " * INLINE,
        "\u00e9" * INLINE,
        list(range(INLINE)),
        [bytes(INLINE) for _ in range(9)],
    ],
    ids=["bytes", "bytearray", "ASCII", "text", "list", "many"],
)
def test_large_stream(body: Any) -> None:
    """What is too large for the socket goes through shared memory, which is free at once."""
    wire = Wire()
    for _ in range(3):
        encoded = wire.encoder.encode(body)
        assert encoded.inline == b""
        got = wire.deliver(encoded)
        assert got == body
        assert type(got) is type(body)
    assert wire.segments.made == 1


def test_large_stream_and_arrays() -> None:
    """The stream lies behind the arrays, with the table of those."""
    body = [NUMBERS, list(range(INLINE)), NUMBERS.T]
    got = Wire()(body)
    assert same(got, body)


def test_crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too many segments are kept, arrays are copied on arrival, and no more are made."""
    monkeypatch.setattr("asgi_infer.workers._segments.MOST", 3)
    wire = Wire()
    kept = [wire(np.full(LARGE, number)) for number in range(20)]
    assert [array[-1] for array in kept] == list(range(20))
    assert wire.segments.made == 4
    assert sum(isinstance(owner(array), Lease) for array in kept) == 3
    assert all(array.flags.writeable for array in kept)


# -- what fails --------------------------------------------------------------------------------


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("not this one")


def test_pickling_fails() -> None:
    """What can't be pickled raises that, takes no memory, and keeps none of the body alive."""
    wire = Wire()
    array = np.zeros(LARGE)
    before = sys.getrefcount(array)
    with pytest.raises(ValueError, match="not this one"):
        wire([array, Unpicklable()])
    assert len(wire.segments) == 0
    assert sys.getrefcount(array) == before


def test_encoding_keeps_nothing() -> None:
    """Once encoded, the sender's arrays are free to die, without a garbage collection."""
    wire = Wire()
    array = np.zeros(LARGE)
    before = sys.getrefcount(array)
    encoded = wire.encoder.encode([array])
    assert sys.getrefcount(array) == before
    wire.deliver(encoded)


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_unpickling_fails() -> None:
    """What can't be unpickled raises that, and its memory is free."""
    wire = Wire()
    with pytest.raises(ValueError, match="no number"):
        wire([np.zeros(LARGE), Unreadable()])
    wire([np.zeros(LARGE)])
    assert wire.segments.made == 1


# -- hooks -------------------------------------------------------------------------------------


def test_dispatch() -> None:
    """Objects of a type that the channel knows are reduced by it, and not by themselves."""
    wire = Wire(dispatch={Unpicklable: lambda _: (str, ("instead",))})
    assert wire([Unpicklable(), NUMBERS[:3]])[0] == "instead"


@pytest.mark.parametrize("name", ["__main__", "__mp_main__"])
@pytest.mark.parametrize("extra", [b"", bytes(10 * INLINE)], ids=["small", "large"])
def test_main_module(name: str, extra: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who unpickles something of the main module is asked where that is; and only then."""
    main = ModuleType(name)
    exec("class Thing:\n class Part: pass", vars(main))
    monkeypatch.setitem(sys.modules, name, main)
    asked = []

    def where() -> str:
        asked.append(name)
        return "tests.workers.main_module"

    there = SimpleNamespace(Thing=SimpleNamespace(Part=dict))
    monkeypatch.setitem(sys.modules, "tests.workers.main_module", there)
    wire = Wire(main=where)
    assert wire([1, "name", len, extra])[0] == 1
    assert asked == []
    assert wire([main.Thing.Part, extra, Box])[0] is dict
    assert asked == [name]


def test_main_module_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child process calls ``__mp_main__`` is ``__main__`` here."""
    child = ModuleType("__mp_main__")
    exec("class Thing: pass", vars(child))
    monkeypatch.setitem(sys.modules, "__mp_main__", child)
    pickled = pickle.dumps(child.Thing, 5)
    monkeypatch.delitem(sys.modules, "__mp_main__")
    monkeypatch.setattr(sys.modules["__main__"], "Thing", Box, raising=False)
    assert loads(pickled) is Box
    assert loads(pickle.dumps(5)) == 5


def test_pieces_with_names_are_short() -> None:
    """The pickler cuts its stream often: only what is shorter than that is searched for names."""
    bodies: list[Any] = [
        list(range(10**5)),
        [Box(Box(str(number))) for number in range(5000)],
        [bytes(65535) for _ in range(5)],
        {str(number): "x" * 65000 for number in range(5)},
    ]
    for body in bodies:
        pieces = _codec._Pieces()
        pickle.Pickler(pieces, 5).dump(body)
        assert max(map(len, pieces)) < _codec._FRAME
        assert len(pieces) > 2


# -- other libraries ---------------------------------------------------------------------------


def test_numpy_stays_out() -> None:
    """A process that has no arrays to send never imports NumPy."""
    script = (
        "import sys\n"
        "from asgi_infer.workers._codec import *\n"
        "from asgi_infer.workers._segments import *\n"
        "encoder = Encoder(Segments(), {})\n"
        "for body in (1, bytes(100000)):\n"
        "    e = encoder.encode(body)\n"
        "    assert decode(e.inline, None, e.layout, e._lease) == body\n"
        "print('numpy' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, check=True, timeout=30, capture_output=True, text=True)
    assert result.stdout == "False\n"


class Tensor:
    """Of ``torch.Tensor`` as much as is asked of it."""

    def __init__(self, array: Any, *, device: str = "cpu", requires_grad: bool = False) -> None:
        self._array = array
        self._requires_grad = requires_grad
        self._device = device

    __slots__ = ("__dict__", "_array", "_device", "_requires_grad")

    def __reduce__(self) -> Any:
        return Tensor, (self._array.tolist(),)

    layout = "torch.strided"
    is_quantized = False
    device = property(lambda self: SimpleNamespace(type=self._device))
    dtype = property(lambda self: self._array.dtype)
    shape = property(lambda self: self._array.shape)
    requires_grad = property(lambda self: self._requires_grad)

    def numel(self) -> int:
        return int(self._array.size)

    def element_size(self) -> int:
        return int(self._array.itemsize)

    def detach(self) -> Tensor:
        return self

    def view(self, shape: Any) -> Tensor:
        return Tensor(self._array.reshape(shape))

    def copy_(self, other: Tensor) -> None:
        self._array[...] = other._array

    def requires_grad_(self, requires_grad: bool) -> Tensor:
        return Tensor(self._array, requires_grad=requires_grad)


def frombuffer(memory: Any, *, dtype: Any, count: int = -1, offset: int = 0) -> Tensor:
    return Tensor(np.frombuffer(memory, dtype, count, offset))


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for PyTorch."""
    stand_in: Any = ModuleType("torch")
    stand_in.Tensor, stand_in.frombuffer = Tensor, frombuffer
    monkeypatch.setitem(sys.modules, "torch", stand_in)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensor(requires_grad: bool) -> None:
    """A tensor on the CPU lies in shared memory."""
    got = Wire()([Tensor(NUMBERS[:, ::2], requires_grad=requires_grad)])[0]
    assert_same(got._array, NUMBERS[:, ::2])
    assert isinstance(owner(got._array), Lease)
    assert got.requires_grad is requires_grad


@pytest.mark.usefixtures("torch")
def test_other_tensors() -> None:
    """Small tensors, those of other devices, and those that carry something with them are
    pickled as PyTorch does it."""
    carrying = Tensor(NUMBERS)
    vars(carrying)["name"] = "something"
    for tensor in (Tensor(NUMBERS[0, :4]), Tensor(NUMBERS, device="cuda"), carrying):
        assert isinstance(Wire()(tensor)._array, list)


def test_library_imported_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is imported when the channel is in use already is known from then on."""
    wire = Wire()
    assert wire(1) == 1
    stand_in: Any = ModuleType("torch")
    stand_in.Tensor, stand_in.frombuffer = Tensor, frombuffer
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    assert isinstance(owner(wire(Tensor(NUMBERS))._array), Lease)


# -- digests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [None, list(range(INLINE))], ids=["inline", "all in memory"])
def test_digest(beside: Any) -> None:
    """The same body has the same digest, whatever was in that memory before, and no other has."""
    wire = Wire()
    encoder = wire.encoder

    def digest(last: int) -> bytes:
        odd = np.zeros(LARGE + 1, np.uint8)
        odd[-1] = last
        return encoder.encode([odd, odd.copy(), beside]).digest()

    before = digest(1)
    encoder.encode(np.full(3 * LARGE, 255, np.uint8))
    assert digest(1) == before
    assert digest(2) != before
    assert encoder.encode(1).digest() != encoder.encode(2).digest()
    wire.segments.close()
