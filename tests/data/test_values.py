"""What stands in a cell, of any size."""

from __future__ import annotations

import pytest

from layerlens.data.values import class_names, is_number, names_of

LONG = "1" * 5000  # more digits than int() reads


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["01", " +2.0 ", "-3", "0.", "-0"], ["1", "2", "-3", "0", "0"]),
        (["12345678901234567890", "12345678901234567891"], ["12345678901234567890", "12345678901234567891"]),
        ([1.0, 2, None], ["1", "2", None]),
        ([LONG, "7"], [LONG, "7"]),
        (["1", "a"], ["1", "a"]),
    ],
)
def test_whole_numbers_are_named_digit_by_digit(values, names):
    assert names_of(values) == names


def test_names_are_in_the_order_of_numbers_whatever_their_size():
    assert class_names(["b", "10", "9", LONG, "²", "a"]) == ("9", "10", LONG, "a", "b", "²")


def test_a_number_beyond_float64_is_none():
    assert not is_number(10**400)
    assert is_number("1e3")
