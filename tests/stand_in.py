"""The CUDA operators on a CPU: csrc/cuda/ops.cpp with a stand-in for the GPU behind it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from affkd_kernels.kernels import extension

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc/cuda/ops.cpp", "csrc/cuda/angle.cpp", "tests/cuda_op/stand_in.cpp")
# as csrc/cuda/params.cuh lists the phases
PHASES = ("gram", "means", "statistics", "count", "rows", "center", "product")


class StandIn:
    """The operators, registered for CPU tensors, and what the kernels would have been given."""

    def __init__(self, library: Path) -> None:
        if extension.load_cuda():
            # where there are no CUDA kernels there are no schemas yet
            self._definitions = torch.library.Library("affkd_kernels", "FRAGMENT")
            for schema in extension.CUDA_SCHEMAS:
                self._definitions.define(schema)
        torch.ops.load_library(library)
        self._functions = ctypes.CDLL(str(library))
        self._functions.affkd_noted.restype = ctypes.c_char_p

    def compute(self, kernels: ctypes.CDLL | None) -> None:
        """From now on calls are computed by the library of tests/cuda_host, or not at all."""
        functions = (None, None) if kernels is None else (kernels.run, kernels.run_angle)
        addresses = (f and ctypes.cast(f, ctypes.c_void_p) for f in functions)
        self._functions.affkd_run_by(*addresses)

    def _lines(self) -> list[list[str]]:
        return [line.split() for line in self._functions.affkd_noted().decode().splitlines()]

    def fields(self) -> dict[str, float]:
        """The parameters of the last call by name; pointers are addresses."""
        noted = [line for line in self._lines() if line[0] != "launch"]
        return {name: float(v) if "." in v or "e" in v else int(v) for name, v in noted}

    def launches(self) -> list[str]:
        """The phases of the last call, in order."""
        return [PHASES[int(line[1])] for line in self._lines() if line[0] == "launch"]


def build(folder: Path) -> Path:
    """Compile the library into a folder; skips the test where that is impossible."""
    compiler = os.environ.get("CXX", "").split()[:1] or [shutil.which("g++") or "c++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"there is no C++ compiler ({compiler[0]})")
    include, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    library = folder / "stand_in.so"
    command = [
        *(*compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"),
        *("-DAFFKD_OPERATOR_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{include}", *(str(ROOT / s) for s in SOURCES)),
        *(f"-L{libraries}", "-ltorch_cpu", "-o", str(library)),
    ]
    subprocess.run(command, check=True)
    return library
