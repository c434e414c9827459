from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

def ghost_norms(
    inputs: Any, output_gradients: Any, *, form: Literal["auto", "gram", "direct"] = "auto", threads: int = 1
) -> NDArray[np.float64]: ...
def ghost_gram(inputs: Any, output_gradients: Any, *, threads: int = 1) -> NDArray[np.float64]: ...
def ghost_form(tokens: int, d_in: int, d_out: int) -> Literal["gram", "direct"]: ...
