"""The binary: of torch it uses the stable C interface alone, and that as old as torch 2.10."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from affkd_kernels.kernels import cpu, extension

usable, reason = cpu.available()
pytestmark = pytest.mark.skipif(not usable, reason=reason)

OLDEST_TORCH = "2.10.0"
INCLUDE = Path(torch.__file__).parent / "include" / "torch" / "csrc"
SHIMS = (INCLUDE / "stable" / "c" / "shim.h", INCLUDE / "inductor" / "aoti_torch" / "c" / "shim.h")
# the length-prefixed namespaces of mangled names
UNSTABLE = re.compile(r"(?<!\d)(2at|3c10|5torch|6caffe2)(?=\d|[A-Z])")


def undefined_symbols() -> list[str]:
    """What the binary expects from others, without the versions that follow an @."""
    if sys.platform != "linux" or shutil.which("nm") is None:
        pytest.skip("reading the symbols needs nm of the GNU binutils")
    command = ["nm", "-D", "--undefined-only", "--format=posix", str(extension.LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split()[0].partition("@")[0] for line in done.stdout.splitlines()]


def of_torch(symbol: str) -> bool:
    return symbol.startswith(("aoti_", "torch_"))


def test_no_class_of_torch_crosses_the_boundary() -> None:
    assert UNSTABLE.search("_ZN2at6TensorC1Ev") and UNSTABLE.search("_ZSt4moveIN3c106ScalarEEvv")
    assert not [symbol for symbol in undefined_symbols() if UNSTABLE.search(symbol)]


def test_everything_of_torch_is_declared_in_the_stable_headers() -> None:
    declared = {
        name
        for header in SHIMS
        for name in re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", header.read_text())
    }
    used = {symbol for symbol in undefined_symbols() if of_torch(symbol)}
    assert len(used) > 10
    assert used <= declared


def test_nothing_is_newer_than_the_oldest_supported_torch() -> None:
    pytest.importorskip("torch_abi_audit")
    command = [sys.executable, "-m", "torch_abi_audit.cli", "--json", str(extension.LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (library,) = json.loads(done.stdout)["bundled_libs"]
    audit = library["torch"]
    assert audit["stable"] and not audit["unstable_symbols"] and not audit["unknown_shim_symbols"]
    assert audit["min_torch_version"] == OLDEST_TORCH


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
