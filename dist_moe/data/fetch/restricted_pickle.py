"""Reading published pickles without running what they name: only what is listed may be built."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

UnpicklingError = pickle.UnpicklingError

Allowed = Mapping[tuple[str, str], Any]
"""The values that stand for each (module, name) that a pickle may refer to."""


def read_arrays(content: bytes, *, encoding: str = "ASCII", allowed: Allowed | None = None) -> Any:
    """Return the content of a pickle of NumPy arrays and plain containers, of any protocol.

    ``encoding``: that of the byte strings of Python 2; "latin1" for arrays that it pickled. ``allowed``: stand-ins for
    further names; they come before NumPy's. Raises UnpicklingError for any other name, which is not imported.
    """
    return _Restricted(content, encoding, {**_NUMPY, **(allowed or {})}).load()


class _Restricted(pickle.Unpickler):
    def __init__(self, content: bytes, encoding: str, allowed: Allowed) -> None:
        super().__init__(io.BytesIO(content), encoding=encoding)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise UnpicklingError(f"the pickle refers to {module}.{name}, which is not allowed") from None


def _from_buffer(buffer: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


_empty_array: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]
"""The function by which NumPy's own pickles begin an array; its home differs between NumPy 1 and 2."""

_NUMPY: Allowed = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}
