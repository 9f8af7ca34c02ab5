"""Reads compiled libraries: what they expect of torch, and what their GPU kernels take."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

INCLUDE = Path(torch.__file__).parent / "include" / "torch" / "csrc"
SHIMS = (INCLUDE / "stable" / "c" / "shim.h", INCLUDE / "inductor" / "aoti_torch" / "c" / "shim.h")
# the length-prefixed namespaces of mangled names
UNSTABLE = re.compile(r"(?<!\d)(2at|3c10|5torch|6caffe2)(?=\d|[A-Z])")


def dynamic_symbols(library: Path, kind: str) -> set[str]:
    """The "undefined" or "defined" dynamic symbols, without the versions that follow an @."""
    if sys.platform != "linux" or shutil.which("nm") is None:
        pytest.skip("reading the symbols needs nm of the GNU binutils")
    command = ["nm", "-D", f"--{kind}-only", "--format=posix", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split()[0].partition("@")[0] for line in done.stdout.splitlines()}


def of_torch(symbol: str) -> bool:
    return symbol.startswith(("aoti_", "torch_"))


def declared_in_stable_headers() -> set[str]:
    names = re.compile(r"\b(?:aoti_)?torch_\w+(?=\()")
    return {name for header in SHIMS for name in names.findall(header.read_text())}


def audit(library: Path) -> dict[str, Any]:
    """What torch-abi-audit, which knows the symbols of every torch, says of the library."""
    pytest.importorskip("torch_abi_audit")
    command = [sys.executable, "-m", "torch_abi_audit.cli", "--json", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout)["bundled_libs"]
    return found["torch"]


class Resources(NamedTuple):
    """What one kernel takes of one architecture."""

    architecture: int  # compute capability times 10
    kernel: str  # as compiled, with its mangled template arguments
    registers: int  # of a thread
    stack: int  # bytes of a thread; spilled registers are among them
    local: int  # bytes of a thread
    shared: int  # static bytes of a block


_KERNEL = re.compile(
    r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE
)


def cuobjdump() -> str | None:
    """The toolkit's tool; Triton ships one too."""
    home = Path("/usr/local/cuda/bin/cuobjdump")
    if found := shutil.which("cuobjdump") or (str(home) if home.exists() else None):
        return found
    try:
        import triton
    except ImportError:
        return None
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(shipped) if shipped.exists() else None


@functools.cache
def resources(library: Path) -> list[Resources]:
    """Of every kernel on every architecture, read from the machine code itself."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("reading the machine code needs cuobjdump, of the CUDA toolkit or of Triton")
    command = [tool, "--dump-resource-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        architecture = int(re.match(r"sm_(\d+)", part)[1])  # type: ignore[index]
        for name, registers, stack, shared, local in _KERNEL.findall(part):
            numbers = map(int, (registers, stack, local, shared))
            found.append(Resources(architecture, name, *numbers))
    return found
