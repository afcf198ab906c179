"""How arrays leave the pickle stream. Imported where NumPy is in use, and nowhere else."""

from __future__ import annotations

import importlib
import mmap
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ._segments import Lease

THRESHOLD = 8192
"""Bytes from which on an array travels in shared memory. Below, copying it is cheaper."""

Bytes = npt.NDArray[np.uint8]
Source = tuple[int, Callable[[mmap.mmap, int], object]]
"""Something to copy: how many bytes it takes, and what writes it to an offset in a mapping."""

# In the pickle stream it says "the next buffer". Never read: what there is to copy stands in the
# list of sources.
_NEXT = pickle.PickleBuffer(bytearray())


def reducer_of(library: str) -> tuple[type, Callable[[Any, list[Source]], Any]]:
    """The type of a library's arrays, and how to reduce them."""
    if library == "torch":
        return importlib.import_module("torch").Tensor, reduce_tensor
    return np.ndarray, reduce_array


def reduce_array(array: npt.NDArray[Any], sources: list[Source]) -> Any:
    """For an exact ndarray: the copy is made in shared memory, whatever its strides are."""
    dtype = array.dtype
    if array.nbytes < THRESHOLD or dtype.hasobject:
        return NotImplemented
    flags = array.flags
    order = "F" if flags.f_contiguous and not flags.c_contiguous else "C"
    sources.append((array.nbytes, partial(_write_array, array, order)))
    # A built-in type is all in its short name. Pickling a type takes longer than the rest here.
    kind = dtype.str if dtype.isbuiltin == 1 else dtype
    return _read_array, (_NEXT, kind, array.shape, order, flags.writeable)


def reduce_tensor(tensor: Any, sources: list[Source]) -> Any:
    """For an exact ``torch.Tensor``: the same if it is dense, on the CPU, and nothing special."""
    plain = tensor.device.type == "cpu" and str(tensor.layout) == "torch.strided"
    size = tensor.numel() * tensor.element_size()
    if not plain or size < THRESHOLD or tensor.is_quantized or vars(tensor):
        return NotImplemented
    sources.append((size, partial(_write_tensor, tensor)))
    return _read_tensor, (_NEXT, tensor.dtype, tuple(tensor.shape), tensor.requires_grad)


def take_buffer(sources: list[Source], buffer: pickle.PickleBuffer) -> bool:
    """For all else that offers its memory to pickle; return whether that stays in the stream."""
    if buffer is not _NEXT:
        raw = buffer.raw()
        if raw.nbytes < THRESHOLD:
            return True
        sources.append((raw.nbytes, partial(_write_raw, raw)))
    return False


def slices(lease: Lease, table: Iterable[tuple[int, int]], *, copied: bool) -> list[Bytes]:
    """The buffers of a message: slices of one array, with which its segment becomes free."""
    span = np.array(lease, copy=copied)
    return [span[start : start + size] for start, size in table]


def _write_array(array: npt.NDArray[Any], order: Any, there: mmap.mmap, offset: int) -> None:
    copy = np.ndarray(array.shape, array.dtype, there, offset, order=order)
    np.copyto(copy, array)  # without the GIL


def _write_raw(raw: memoryview, there: mmap.mmap, offset: int) -> None:
    copy = np.frombuffer(there, np.uint8, raw.nbytes, offset)
    np.copyto(copy, np.frombuffer(raw, np.uint8))


def _write_tensor(tensor: Any, there: mmap.mmap, offset: int) -> None:
    torch = importlib.import_module("torch")
    copy = torch.frombuffer(there, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    copy.view(tensor.shape).copy_(tensor.detach())


def _read_array(memory: Bytes, dtype: Any, shape: Any, order: Any, writeable: bool) -> Any:
    array = np.ndarray(shape, dtype, memory, order=order)
    if not writeable:
        array.flags.writeable = False
    return array


def _read_tensor(memory: Bytes, dtype: Any, shape: Any, requires_grad: bool) -> Any:
    torch = importlib.import_module("torch")
    return torch.frombuffer(memory, dtype=dtype).view(shape).requires_grad_(requires_grad)
