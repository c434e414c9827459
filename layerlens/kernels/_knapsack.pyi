from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]
_Integers = NDArray[np.int64]

class Instance:
    offset: _Integers
    value: _Floats
    cost_rows: tuple[_Floats, ...]
    capacity: _Floats
    def __init__(self, offset: Any, value: Any, cost_rows: Sequence[Any], capacity: Any) -> None: ...
    @property
    def n_groups(self) -> int: ...
    @property
    def n_resources(self) -> int: ...
    def score_groups(self, price: _Floats, threads: int = 1) -> tuple[_Integers, _Floats, _Floats]: ...
    def select_reachable(
        self, price: _Floats, reach: _Floats, choice: _Integers, best: _Floats, threads: int = 1
    ) -> tuple[_Integers, _Integers]: ...
    def select_core(self, price: _Floats, best: _Floats, limit: float, room: int) -> tuple[int, _Integers, _Floats]: ...

class Charges:
    node_begin: _Integers
    row_begin: _Integers
    child: _Integers
    stage: _Integers
    root: _Integers
    stage_item: _Integers
    switch_root: _Integers
    def __init__(
        self,
        n_items: int,
        node_begin: Any,
        row_begin: Any,
        child: Any,
        stage: Any,
        root: Any,
        stage_item: Any,
        switch_root: Any,
    ) -> None: ...
    @property
    def n_modes(self) -> int: ...
    def score_modes(self, best: _Floats) -> tuple[_Floats, _Floats]: ...
    def items_of(self, value: _Floats, mode: int) -> _Integers: ...

class Core:
    offset: _Integers
    value: _Floats
    cost__cr: _Floats
    capacity: _Floats
    def __init__(self, offset: Any, value: Any, cost__cr: Any, capacity: Any) -> None: ...
    def local_search(self, price: _Floats, choice: _Integers, use__r2: _Floats, pair_limit: int) -> bool: ...
    def beam_search(
        self,
        price: _Floats,
        favourite: _Integers,
        threshold: float,
        choice: _Integers,
        width: int,
        softness: float = 3.0,
        seed: int = 0,
    ) -> tuple[float, float, int, int]: ...

class RowSummary(NamedTuple):
    lowest: float
    highest: float
    sum_of_lowest: float
    sum_of_highest: float
    finite: bool

def minimise_dual(
    instance: Instance,
    start: Any,
    radius: _Floats,
    tolerance: float,
    max_evaluations: int,
    threads: int = 1,
    farthest: Any = ...,
    charges: Charges | None = None,
    mode: int = -1,
) -> tuple[_Floats, _Floats, _Floats]: ...
def sum_use(amount: _Floats) -> tuple[float, float]: ...
def summarise_row(offset: _Integers, row: _Floats, threads: int = 1) -> RowSummary: ...
def group_hulls(offset: _Integers, value: _Floats, cost: _Floats, threads: int = 1) -> tuple[_Integers, _Integers]: ...
