"""The CUDA library: the stable interface of torch alone, as old as 2.10, loadable without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from binary import (
    UNSTABLE,
    audit,
    declared_in_stable_headers,
    dynamic_symbols,
    of_torch,
)

from affkd_kernels.kernels import cuda, extension

LIBRARY = extension.CUDA_LIBRARY
reason = extension.load_cuda()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


def test_no_class_of_torch_crosses_the_boundary() -> None:
    assert not [name for name in dynamic_symbols(LIBRARY, "undefined") if UNSTABLE.search(name)]


def test_everything_of_torch_is_declared_in_the_stable_headers() -> None:
    used = {name for name in dynamic_symbols(LIBRARY, "undefined") if of_torch(name)}
    assert "aoti_torch_get_current_cuda_stream" in used
    assert used <= declared_in_stable_headers()


def test_nothing_is_newer_than_the_oldest_supported_torch() -> None:
    found = audit(LIBRARY)
    assert found["stable"] and not found["unstable_symbols"] and not found["unknown_shim_symbols"]
    assert found["min_torch_version"] == "2.10.0"


def test_python_is_not_needed_and_nothing_is_offered() -> None:
    undefined = dynamic_symbols(LIBRARY, "undefined")
    assert not [name for name in undefined if re.match(r"_?Py[A-Z_]", name)]
    defined = dynamic_symbols(LIBRARY, "defined")
    assert not [name for name in defined if "affkd" in name]


def test_the_runtime_is_the_one_that_torch_brings() -> None:
    """A runtime of its own would keep state beside torch's."""
    if shutil.which("readelf") is None:
        pytest.skip("reading the header needs readelf of the GNU binutils")
    command = ["readelf", "--dynamic", str(LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    assert torch.version.cuda is not None
    assert f"libcudart.so.{torch.version.cuda.partition('.')[0]}" in needed
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not [name for name in needed if "python" in name]
    assert "RUNPATH" not in text and "RPATH" not in text


@pytest.mark.parametrize("name", ["cuda_loss_and_grad", "cuda_row_losses", "cuda_angle"])
def test_the_operators_are_for_cuda_tensors(name: str) -> None:
    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"affkd_kernels::{name}", key)

    assert has("CUDA")
    assert not has("Meta") and not has("AutogradCUDA")


def test_the_architectures_are_told() -> None:
    found = extension.cuda_architectures()
    assert found == sorted(found) and min(found) >= 80


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_told() -> None:
    assert cuda.available() == (False, "there is no CUDA device that torch can use")


def test_a_library_that_was_not_built_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(extension, "CUDA_LIBRARY", tmp_path / "_cuda.abi3.so")
    told = extension.load_cuda.__wrapped__()
    assert "_cuda.abi3.so is missing" in told and "AFFKD_BUILD_CUDA=1" in told


def test_another_build_is_loaded_by_its_path(tmp_path: Path) -> None:
    copy = Path(shutil.copy(LIBRARY, tmp_path / "another.so"))
    code = (
        "import torch; from affkd_kernels.kernels import extension; "
        "assert not extension.load_cuda(); print(*torch.ops.loaded_libraries)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "AFFKD_CUDA_LIBRARY": str(copy)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(copy) in done.stdout and LIBRARY.name not in done.stdout


def test_a_library_that_does_not_load_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "_cuda.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(extension, "CUDA_LIBRARY", broken)
    monkeypatch.setattr(extension, "CUDA_SCHEMAS", ())
    told = extension.load_cuda.__wrapped__()
    assert told.startswith(f"_cuda.abi3.so does not load into torch {torch.__version__}: ")
