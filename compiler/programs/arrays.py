"""From tensors of any kind to numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def float64_from_array(values: Any) -> NDArray[np.float64]:
    """Anything array-like as a float64 array of the same shape: a copy where it is not one yet.

    Tensors of torch may have any dtype and device and may hold gradients; numpy itself reads no bfloat16, no gradients
    and no GPU.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
