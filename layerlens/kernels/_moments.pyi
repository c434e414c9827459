from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

class RowMoments(NamedTuple):
    sum: NDArray[np.float64]
    sum_of_squares: NDArray[np.float64]
    max_abs: NDArray[np.float64]

class Statistics(NamedTuple):
    sum: NDArray[np.float64]
    sum_of_squares: NDArray[np.float64]
    max_abs: NDArray[np.float64]
    non_finite: NDArray[np.int64]
    zeros: NDArray[np.int64]

# Any: a NumPy array, a buffer or a CPU tensor (DLPack).
def row_statistics(x: Any, *, threads: int = 1) -> Statistics: ...
def row_moments(x: Any, *, threads: int = 1) -> RowMoments: ...
def row_sum_of_squares(x: Any, *, threads: int = 1) -> NDArray[np.float64]: ...
def gradient_energy(x: Any, *, threads: int = 1) -> float: ...
def ragged_statistics(arrays: Iterable[Any], *, threads: int = 1) -> Statistics: ...
def ragged_sum_of_squares(arrays: Iterable[Any], *, threads: int = 1) -> NDArray[np.float64]: ...
def matrix_traces(matrices: Iterable[Any], *, threads: int = 1) -> NDArray[np.float64]: ...
