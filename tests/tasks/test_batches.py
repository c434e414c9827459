"""Batches of any targets: moved to a device, and with the halves of the calibration set apart."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from layerlens.tasks import Batch

Place = namedtuple("Place", ["x", "y"])
INDEX = [5, 2, 7, 0, 4]


def target(number: int) -> dict[str, Any]:
    """Targets as a user's data set may give them: nested, and with texts."""
    return {
        "class": number,
        "box": (float(number), torch.full((2, 2), float(number))),
        "place": Place(number, -number),
        "name": f"sample {number}",
        "words": (f"a{number}", f"b{number}"),
    }


def batch_of(numbers: list[int]) -> Batch:
    inputs = {"image": torch.stack([torch.full((3,), float(number)) for number in numbers])}
    return Batch(inputs, default_collate([target(number) for number in numbers]), torch.tensor(numbers))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_halves_apart_is_the_batch_of_the_samples_in_that_order():
    apart, expected = batch_of(INDEX).halves_apart(), batch_of([2, 0, 4, 5, 7])
    assert apart.index.tolist() == expected.index.tolist()
    assert same(apart.inputs, expected.inputs)
    assert same(apart.labels, expected.labels)
    assert isinstance(apart.labels["place"], Place)


def test_a_batch_whose_halves_are_apart_already_stays_what_it_is():
    batch = batch_of([2, 4, 5, 7])
    assert batch.halves_apart() is batch


@pytest.mark.parametrize("order", [None, "apart"])
def test_every_tensor_of_a_batch_is_moved_but_its_index(order):
    batch = batch_of(INDEX)
    if order:
        batch = batch.halves_apart()
    moved = batch.to(torch.device("meta"))
    tensors = [moved.inputs["image"], moved.labels["class"], *moved.labels["box"], *moved.labels["place"]]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.labels["name"] == batch.labels["name"]
    assert same(moved.index, batch.index)
