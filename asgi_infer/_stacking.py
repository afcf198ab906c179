"""Items of a batch, joined for a function that takes them all at once, and taken apart again.

NumPy is imported where it is needed: most runners batch nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

_ROWS = "as many results as it got items, in a list or an array"


# -- items as they are -------------------------------------------------------------------------


def any_item(item: Any) -> Hashable:
    """The key of an item that may share a batch with every other."""
    del item
    return None


def as_list(items: list[Any]) -> list[Any]:
    """The items as they are."""
    return items


def results(returned: Any, count: int) -> list[Any]:
    """The results in ``returned``, of which there must be ``count``.

    A tuple is what functions return that have several results for one question, such as the
    logits and the states of a network: it is not taken for a list, even if its length fits.

    :raises TypeError: it is no list or array, or has another length
    """
    if _is_array(returned):
        return _rows(returned, count)
    if isinstance(returned, tuple):
        raise TypeError(
            f"returned a tuple; a batch function must return {_ROWS}. For several values for "
            f"each item return a list of tuples: list(zip(...))"
        )
    if not isinstance(returned, Sequence) or isinstance(returned, _TEXT):
        kind = type(returned).__qualname__
        raise TypeError(f"returned a {kind}; a batch function must return {_ROWS}")
    if len(returned) != count:
        raise TypeError(
            f"returned {len(returned)} results for {count} items; it must return {_ROWS}"
        )
    return list(returned)


_TEXT = str | bytes | bytearray | memoryview


# -- stacked -----------------------------------------------------------------------------------


def stack_key(item: Any) -> Hashable:
    """The key of an item for stacking: structure, shapes and dtypes.

    :raises TypeError: it is no array, nor a tuple or dict of arrays, or can't be stacked
    """
    if isinstance(item, tuple):
        return type(item), *map(_array_key, item)
    if isinstance(item, dict):
        return dict, frozenset((name, _array_key(array)) for name, array in item.items())
    return _array_key(item)


def stack(items: list[Any]) -> Any:
    """One array, or a tuple or dict of them, with the items as rows: the only copy."""
    import numpy as np

    first = items[0]
    if isinstance(first, tuple):
        return _tuple_like(first, map(np.stack, zip(*items, strict=True)))
    if isinstance(first, dict):
        return {name: np.stack([item[name] for item in items]) for name in first}
    return np.stack(items)


def unstack(returned: Any, count: int) -> list[Any]:
    """The rows of an array as views, or tuples or dicts of rows; lists as ``results`` does it.

    :raises TypeError: it is none of these, or has another number of rows than ``count``
    """
    if isinstance(returned, tuple) and returned and all(map(_is_array, returned)):
        columns = [_rows(column, count) for column in returned]
        return [_tuple_like(returned, row) for row in zip(*columns, strict=True)]
    if isinstance(returned, dict) and returned and all(map(_is_array, returned.values())):
        columns = [_rows(column, count) for column in returned.values()]
        return [dict(zip(returned, row, strict=True)) for row in zip(*columns, strict=True)]
    return results(returned, count)


def _tuple_like(pattern: tuple[Any, ...], values: Iterable[Any]) -> tuple[Any, ...]:
    """A tuple, named if the pattern is."""
    make = getattr(type(pattern), "_make", tuple)
    made: tuple[Any, ...] = make(values)
    return made


def _array_key(array: Any) -> Hashable:
    import numpy as np

    # What differs from an array in what its axes mean, or holds a mask, stacking would spoil.
    odd = np.ma.MaskedArray | np.matrix
    if not isinstance(array, np.ndarray | np.generic) or isinstance(array, odd):
        raise TypeError(
            f"with stack=True an item must be a NumPy array, or a tuple or dict of arrays, not "
            f"{type(array).__qualname__}; convert it with numpy.asarray(...)"
        )
    if array.dtype.hasobject:
        raise TypeError(
            f"an array of dtype {array.dtype} holds Python objects and can't be stacked; convert "
            f"it to numbers, for example with array.astype(numpy.float32)"
        )
    return array.shape, array.dtype


# -- arrays ------------------------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    # By what it can do: tensors of PyTorch and others are as good.
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__")


def _rows(array: Any, count: int) -> list[Any]:
    shape = tuple(array.shape)
    if not shape or shape[0] != count:
        raise TypeError(
            f"returned an array of shape {shape} for {count} items; it must return {_ROWS}"
        )
    return list(array)
