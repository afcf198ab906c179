"""Items of a batch, joined for a function that takes them all at once, and taken apart again.

NumPy is imported where it is needed: most runners batch nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

_ROWS = "as many results as it got items, in a list, a tuple or an array"


def any_item(item: Any) -> Hashable:
    """The key of an item that may share a batch with every other."""
    del item
    return None


def as_list(items: list[Any]) -> list[Any]:
    """The items as they are."""
    return items


def results(returned: Any, count: int) -> Sequence[Any]:
    """The results in ``returned``, of which there must be ``count``.

    :raises TypeError: it is no list, tuple or array, or has another length
    """
    if not isinstance(returned, list | tuple) and not _is_array(returned):
        kind = type(returned).__qualname__
        raise TypeError(f"returned a {kind}; a batch function must return {_ROWS}")
    return _checked(returned, count)


def stack_key(item: Any) -> Hashable:
    """The key of an item for stacking: structure, shapes and dtypes.

    :raises TypeError: it is no array, nor a tuple or dict of arrays, or holds Python objects
    """
    if isinstance(item, tuple):
        return tuple(map(_array_key, item))
    if isinstance(item, dict):
        return tuple((name, _array_key(array)) for name, array in item.items())
    return _array_key(item)


def stack(items: list[Any]) -> Any:
    """One array, or a tuple or dict of them, with the items as rows: the only copy."""
    import numpy as np

    first = items[0]
    if isinstance(first, tuple):
        return tuple(np.stack(column) for column in zip(*items, strict=True))
    if isinstance(first, dict):
        return {name: np.stack([item[name] for item in items]) for name in first}
    return np.stack(items)


def unstack(returned: Any, count: int) -> Sequence[Any]:
    """The rows of an array as views, or tuples or dicts of rows; lists as ``results`` does it.

    :raises TypeError: it is none of these, or has another number of rows than ``count``
    """
    if isinstance(returned, tuple) and all(map(_is_array, returned)):
        columns = [_checked(column, count) for column in returned]
        return list(zip(*columns, strict=True)) if columns else _checked(returned, count)
    if isinstance(returned, dict) and returned and all(map(_is_array, returned.values())):
        columns = [_checked(column, count) for column in returned.values()]
        return [dict(zip(returned, row, strict=True)) for row in zip(*columns, strict=True)]
    return results(returned, count)


def _is_array(value: Any) -> bool:
    # By what it can do: tensors of PyTorch and others are as good.
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__")


def _checked(rows: Any, count: int) -> Sequence[Any]:
    length = len(rows) if getattr(rows, "shape", True) != () else 0
    if length != count:
        what = f"an array of shape {tuple(rows.shape)}" if _is_array(rows) else f"{length} results"
        raise TypeError(f"returned {what} for {count} items; it must return {_ROWS}")
    checked: Sequence[Any] = rows
    return checked


def _array_key(array: Any) -> Hashable:
    import numpy as np

    if not isinstance(array, np.ndarray | np.generic):
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
