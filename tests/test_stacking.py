"""Items joined into one argument, and what came back taken apart again."""

from __future__ import annotations

from collections import UserList, deque
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from asgi_infer._stacking import any_item, as_list, results, stack, stack_key, unstack

ROW = np.arange(3.0)


class Pair(NamedTuple):
    left: Any
    right: Any


class Tensor:
    """What another library's arrays have in common with NumPy's: no subclass, no ``len()``."""

    dtype = "float32"

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        self.shape = (len(rows),)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


# -- items as they are -------------------------------------------------------------------------


def test_any_items_share_a_batch() -> None:
    """Without stacking all keys are equal, and the function gets the very list."""
    assert any_item(1) == any_item("text") == any_item(ROW)
    items = [1, "text"]
    assert as_list(items) is items


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2, 3],
        UserList([1, 2, 3]),
        deque([1, 2, 3]),
        range(1, 4),
        np.array([1, 2, 3]),
        Tensor([1, 2, 3]),
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_results(returned: Any) -> None:
    """A list or other sequence, an array or a tensor, with as many results, is a list of them."""
    found = results(returned, 3)
    assert type(found) is list
    assert found == [1, 2, 3]


def test_results_are_a_list_of_their_own() -> None:
    """What the function does to its list later on changes nothing."""
    returned = [1, 2]
    found = results(returned, 2)
    returned.clear()
    assert found == [1, 2]


def test_rows_are_views() -> None:
    """The rows of an array are not copied."""
    array = np.ones((4, 3))
    assert all(np.shares_memory(row, array) for row in results(array, 4))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned a NoneType; a batch function must return as many results as it got"),
        ("ab", "returned a str;"),
        (b"ab", "returned a bytes;"),
        (bytearray(b"ab"), "returned a bytearray;"),
        (memoryview(b"ab"), "returned a memoryview;"),
        ({1: 2, 3: 4}, "returned a dict;"),
        ({1, 2}, "returned a set;"),
        (2, "returned a int;"),
        ((1, 2), "returned a tuple; .* return a list of tuples"),
        ([1], "returned 1 results for 2 items; it must return as many"),
        ([1, 2, 3], "returned 3 results for 2 items"),
        ([], "returned 0 results for 2 items"),
        (np.ones(3), r"returned an array of shape \(3,\) for 2 items"),
        (np.ones((1, 2)), r"returned an array of shape \(1, 2\) for 2 items"),
        (np.array(2.0), r"returned an array of shape \(\) for 2 items"),
        (np.float64(2.0), r"returned an array of shape \(\) for 2 items"),
        (Tensor([1]), r"returned an array of shape \(1,\) for 2 items"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
@pytest.mark.parametrize("split", [results, unstack])
def test_wrong_results(split: Any, returned: Any, message: str) -> None:
    """Anything else, and any other number, is refused in words that say what was returned."""
    with pytest.raises(TypeError, match=message):
        split(returned, 2)


# -- stacking ----------------------------------------------------------------------------------


def test_stack_arrays() -> None:
    """Arrays become the rows of one, which is a copy."""
    items = [ROW, ROW + 1]
    stacked = stack(items)
    assert stacked.tolist() == [[0, 1, 2], [1, 2, 3]]
    assert not any(np.shares_memory(stacked, item) for item in items)


def test_stack_of_one_is_a_copy() -> None:
    """A function may write into its argument: a batch of one is no exception."""
    assert not np.shares_memory(stack([ROW]), ROW)


def test_stack_numbers() -> None:
    """Arrays without axes, and NumPy's numbers, become a vector."""
    assert stack([np.float32(1), np.array(2, np.float32)]).tolist() == [1, 2]
    assert stack_key(np.float32(1)) == stack_key(np.array(2, np.float32))


@pytest.mark.parametrize(
    "items",
    [
        [(ROW, np.int64(1)), (ROW + 1, np.int64(2))],
        [Pair(ROW, np.int64(1)), Pair(ROW + 1, np.int64(2))],
        [{"left": ROW, "right": np.int64(1)}, {"right": np.int64(2), "left": ROW + 1}],
    ],
    ids=["tuples", "named tuples", "dicts"],
)
def test_stack_and_unstack_structures(items: list[Any]) -> None:
    """Tuples and dicts are stacked member by member, and taken apart into the same again."""
    assert stack_key(items[0]) == stack_key(items[1])
    stacked = stack(items)
    assert type(stacked) is type(items[0])
    rows = unstack(stacked, 2)
    assert [type(row) for row in rows] == [type(item) for item in items]
    assert repr(stack(rows)) == repr(stacked)


NATIVE = (  # np.stack converts the other byte order into this one
    arrays.boolean_dtypes()
    | arrays.integer_dtypes(endianness="=")
    | arrays.floating_dtypes(endianness="=")
)


@settings(max_examples=50)
@given(
    st.integers(1, 5).flatmap(
        lambda count: arrays.arrays(
            NATIVE, arrays.array_shapes(min_dims=0, max_dims=2).map(lambda s: (count, *s))
        )
    )
)
def test_unstack_undoes_stack(array: np.ndarray[Any, Any]) -> None:
    """For every dtype and shape the rows are those of the array, bit for bit."""
    items = list(array)
    assert len({stack_key(item) for item in items}) == 1
    rows = unstack(stack(items), len(items))
    assert [row.tobytes() for row in rows] == [item.tobytes() for item in items]
    assert {row.dtype for row in rows} == {array.dtype}


DIFFERENT = [
    ROW,
    np.arange(4.0),
    np.arange(3),
    np.arange(3.0).reshape(1, 3),
    ROW.astype(">f8"),
    (ROW,),
    (ROW, ROW),
    Pair(ROW, ROW),
    {"a": ROW},
    {"b": ROW},
    {"a": ROW, "b": ROW},
    {"a": np.arange(3), "b": ROW},
    (),
    {},
    np.array("abc"),
    np.array("abcd"),
]


def test_only_equal_shapes_and_dtypes_share_a_key() -> None:
    """Nothing that NumPy would convert, or could not stack, gets an equal key."""
    assert len({stack_key(item) for item in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, "must be a NumPy array, or a tuple or dict of arrays, not int; convert it with"),
        ([1, 2], "not list"),
        ("text", "not str"),
        ((ROW, 3), "not int"),
        ({"a": [1]}, "not list"),
        (np.ma.masked_array(ROW, ROW > 1), "not MaskedArray"),
        (ROW.reshape(1, 3).view(np.matrix), "not matrix"),
        (np.array([object()]), "dtype object holds Python objects"),
        (np.zeros(2, [("a", "O")]), "holds Python objects"),
    ],
)
def test_what_cannot_be_stacked(item: Any, message: str) -> None:
    """It is refused when its key is asked for: before it is queued."""
    with pytest.raises(TypeError, match=message):
        stack_key(item)


# -- taken apart -------------------------------------------------------------------------------


def test_unstack_returns_views() -> None:
    """Arrays alone, in tuples and in dicts are taken apart without a copy."""
    array = np.ones((2, 3))
    rows = [*unstack(array, 2), unstack((array,), 2)[0][0], unstack({"a": array}, 2)[0]["a"]]
    assert all(np.shares_memory(row, array) for row in rows)


def test_unstack_lists() -> None:
    """A list of results is taken as it is, also one of arrays."""
    assert unstack([{"a": 1}, {"b": 2}], 2) == [{"a": 1}, {"b": 2}]
    assert [array.shape for array in unstack([np.ones(2), np.ones(3)], 2)] == [(2,), (3,)]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((np.ones(2), np.ones(3)), r"array of shape \(3,\) for 2 items"),
        ({"a": np.ones((2, 2)), "b": np.ones(1)}, r"array of shape \(1,\) for 2 items"),
        ((np.ones(2), 3), "returned a tuple"),
        ({"a": np.ones(2), "b": [1, 2]}, "returned a dict"),
        ((), "returned a tuple"),
        ({}, "returned a dict"),
    ],
)
def test_unstack_wrong_columns(returned: Any, message: str) -> None:
    """Every array must have as many rows, and there must be one."""
    with pytest.raises(TypeError, match=message):
        unstack(returned, 2)
