from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from numpy.typing import NDArray

class TraceEstimate(NamedTuple):
    trace: float
    standard_error: float
    probes: int

def rademacher(
    size: int, *, seed: int, probe: int = 0, dtype: Literal["float32", "float64"] = "float32"
) -> NDArray[Any]: ...
def hutchinson_trace(
    apply: Callable[[NDArray[Any]], Any],
    size: int,
    *,
    probes: int = 32,
    seed: int = 0,
    dtype: Literal["float32", "float64"] = "float32",
) -> TraceEstimate: ...
