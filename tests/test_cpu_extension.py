"""Loading the compiled kernels: late, and with a reason where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import affkd_kernels as affkd
from affkd_kernels import functional
from affkd_kernels.kernels import cpu, extension


def test_importing_the_package_loads_no_library() -> None:
    code = "import torch, affkd_kernels; print(torch.ops.loaded_libraries)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "_cpu" not in done.stdout


def test_a_library_that_was_not_built_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_cpu.abi3.so")
    reason = extension.load.__wrapped__()
    assert "_cpu.abi3.so is missing" in reason and "AFFKD_BUILD_CPU=1" in reason


def test_asking_for_missing_kernels_by_name_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "load", lambda: "no compiler was found")
    # what other tests have called is known to run
    monkeypatch.setattr(functional, "_plans", {})
    with pytest.raises(RuntimeError, match="no compiler was found"):
        affkd.affinity_loss(torch.ones(2, 1), torch.ones(2, 1), backend="cpp", algorithm="dense")


@pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
def test_the_baseline_is_always_there() -> None:
    assert extension.usable_capabilities()[0] == "baseline"
