from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

_Out = TypeVar("_Out")

def fisher_trace(g: Any, *, threads: int = 1) -> float: ...
@overload
def fisher_diagonal(
    g: Any, out: None = None, *, scale: float | None = None, threads: int = 1
) -> NDArray[np.float64]: ...
@overload
def fisher_diagonal(g: Any, out: _Out, *, scale: float | None = None, threads: int = 1) -> _Out: ...
