"""Triton's kernels without a GPU: run by Triton's interpreter, and compiled to the machine code of GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]


def test_the_kernels_of_triton_pass_the_same_tests() -> None:
    pytest.importorskip("triton")
    files = [HERE / "test_parity.py", HERE / "interpreted.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_compile_to_machine_code(capability: int, tmp_path: Path) -> None:
    """What the interpreter does not tell: whether the compiler takes them, and whether shared memory suffices."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.gpu.compiled", str(capability), "bfloat16", "float32", "float64"],
        cwd=REPOSITORY,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("bytes of shared memory") == 3 * 14
