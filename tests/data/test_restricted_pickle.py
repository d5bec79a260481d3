"""Arrays come through; whatever a pickle would run does not."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_moe.data.fetch.restricted_pickle import read_arrays

ARRAYS: dict[str, NDArray[Any]] = {
    "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "objects": np.array(["a", None, 1.5], dtype=object),
    "big-endian": np.arange(3, dtype=">i2"),
}


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_in_containers(name: str, protocol: int) -> None:
    array = ARRAYS[name]
    ((read, label),) = read_arrays(pickle.dumps([(array, "label")], protocol=protocol))
    assert label == "label"
    assert read.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(read, array)


def test_byte_strings_of_python_2() -> None:
    """As Python 2 wrote them: protocol 0, the names of NumPy 1, the bytes in a str."""
    content = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\xe9\\x01'\ntb."
    )
    assert read_arrays(content, encoding="latin1").tolist() == [0xE9, 1]


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_function_is_neither_imported_nor_run(tmp_path: Path) -> None:
    content = pickle.dumps([np.zeros(2), Attack(tmp_path / "made")])
    with pytest.raises(pickle.UnpicklingError, match=r"mkdir, which is not allowed"):
        read_arrays(content)
    assert not (tmp_path / "made").exists()
    pickle.loads(content)
    assert (tmp_path / "made").exists()


def test_harmless_classes_are_refused_unless_they_are_listed() -> None:
    content = pickle.dumps(OrderedDict(a=1))
    with pytest.raises(pickle.UnpicklingError, match=r"collections\.OrderedDict"):
        read_arrays(content)
    assert read_arrays(content, allowed={("collections", "OrderedDict"): dict}) == {"a": 1}
