"""Arrow's arrays as numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def numpy_view(array: pa.Array) -> NDArray[Any]:
    """A view of numbers without nulls, (len(array),); it keeps the array's memory.

    As array.to_numpy(), which imports pandas when it is first called: most of a second.
    """
    dtype = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.empty(0, dtype)
    start = array.offset * dtype.itemsize
    return np.frombuffer(array.buffers()[1], dtype, len(array), start)
