from typing import Any, Literal

from numpy.typing import NDArray

def rademacher(
    size: int, *, seed: int, probe: int = 0, dtype: Literal["float32", "float64"] = "float32"
) -> NDArray[Any]: ...
