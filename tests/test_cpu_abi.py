"""The binary: of torch it uses the stable C interface alone, and that as old as torch 2.10."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from binary import UNSTABLE, audit, declared_in_stable_headers, dynamic_symbols, of_torch

from affkd_kernels.kernels import cpu, extension

usable, reason = cpu.available()
pytestmark = pytest.mark.skipif(not usable, reason=reason)

OLDEST_TORCH = "2.10.0"


def undefined_symbols() -> set[str]:
    return dynamic_symbols(extension.LIBRARY, "undefined")


def test_no_class_of_torch_crosses_the_boundary() -> None:
    assert UNSTABLE.search("_ZN2at6TensorC1Ev") and UNSTABLE.search("_ZSt4moveIN3c106ScalarEEvv")
    assert not [symbol for symbol in undefined_symbols() if UNSTABLE.search(symbol)]


def test_everything_of_torch_is_declared_in_the_stable_headers() -> None:
    used = {symbol for symbol in undefined_symbols() if of_torch(symbol)}
    assert len(used) > 10
    assert used <= declared_in_stable_headers()


def test_nothing_is_newer_than_the_oldest_supported_torch() -> None:
    found = audit(extension.LIBRARY)
    assert found["stable"] and not found["unstable_symbols"] and not found["unknown_shim_symbols"]
    assert found["min_torch_version"] == OLDEST_TORCH


def test_another_build_is_loaded_by_its_path(tmp_path: Path) -> None:
    """Without this a check of another build would silently run the installed one."""
    copy = Path(shutil.copy(extension.LIBRARY, tmp_path / "another.so"))
    code = (
        "import torch; from affkd_kernels.kernels import cpu; "
        "assert cpu.available()[0]; print(*torch.ops.loaded_libraries)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "AFFKD_CPU_LIBRARY": str(copy)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(copy) in done.stdout and extension.LIBRARY.name not in done.stdout
