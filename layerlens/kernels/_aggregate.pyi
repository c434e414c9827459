from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def aggregate_scores(
    metrics: Mapping[str, Any], weights: Mapping[str, float], layers: Sequence[str] | None = None
) -> NDArray[np.float64]: ...
