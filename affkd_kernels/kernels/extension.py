"""Loads the compiled kernels on first use, and says why where there are none.

The schemas of the compiled operators are defined here; the binary holds implementations only.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
# another build of the same kernels, such as the one with sanitizers, is named by its path
LIBRARY = Path(os.environ.get("AFFKD_CPU_LIBRARY") or _PACKAGE / "_cpu.abi3.so")
CUDA_LIBRARY = Path(os.environ.get("AFFKD_CUDA_LIBRARY") or _PACKAGE / "_cuda.abi3.so")

_TENSORS = (
    "Tensor student, Tensor teacher, Tensor? student_keys, Tensor? teacher_keys, Tensor? mask, "
    "Tensor? key_mask, Tensor? pair_mask, Tensor? row_weight"
)
_OPTIONS = "int[] choices, float[] numbers"
_ANGLE = (
    "(Tensor student_squared, Tensor student_inverse, Tensor teacher_squared, "
    "Tensor teacher_inverse, float beta, bool need_slope) -> (Tensor, Tensor)"
)
CPU_SCHEMAS = (
    f"cpu_loss_and_grad({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor?, Tensor?, Tensor?)",
    f"cpu_row_losses({_TENSORS}, {_OPTIONS}) -> Tensor",
    f"cpu_angle{_ANGLE}",
    "cpu_capability_index() -> int",
    "cpu_exponential(Tensor x) -> Tensor",
    "cpu_log_ratio(Tensor a, Tensor b) -> Tensor",
)
# scales per call are tensors here: reading a number off a GPU would wait for it
_SCALES = "Tensor? student_scale, Tensor? teacher_scale"
CUDA_SCHEMAS = (
    f"cuda_loss_and_grad({_TENSORS}, {_SCALES}, {_OPTIONS}) -> (Tensor, Tensor?, Tensor?, Tensor?)",
    f"cuda_row_losses({_TENSORS}, {_SCALES}, {_OPTIONS}) -> Tensor",
    f"cuda_angle{_ANGLE}",
    "cuda_architectures() -> int[]",
    "cuda_major() -> int",
)
# as AFFKD_CPU_CAPABILITY names them
CAPABILITIES = ("baseline", "avx2", "avx512")

# definitions live as long as this object
_definitions: list[torch.library.Library] = []


@functools.cache
def load() -> str:
    """Load the compiled CPU kernels; once per process.

    Returns:
        The empty string, or why they cannot be used here.
    """
    if not LIBRARY.exists():
        return (
            f"the C++ kernels were not built ({LIBRARY.name} is missing); "
            "reinstall with a C++ compiler at hand and AFFKD_BUILD_CPU=1 to see what fails"
        )
    return _load(LIBRARY, CPU_SCHEMAS)


@functools.cache
def load_cuda() -> str:
    """Load the compiled CUDA kernels; once per process. No GPU is needed or touched.

    Returns:
        The empty string, or why they cannot be used here.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not CUDA_LIBRARY.exists():
        return (
            f"the C++ CUDA kernels were not built ({CUDA_LIBRARY.name} is missing); reinstall with "
            f"nvcc of CUDA {torch.version.cuda.partition('.')[0]} at hand and AFFKD_BUILD_CUDA=1 "
            "to see what fails"
        )
    return _load(CUDA_LIBRARY, CUDA_SCHEMAS) or _another_cuda()


def _another_cuda() -> str:
    """Where both runtimes are installed the library loads, and brings one that torch has not."""
    major = torch.ops.affkd_kernels.cuda_major()
    if str(torch.version.cuda).partition(".")[0] == str(major):
        return ""
    return (
        f"{CUDA_LIBRARY.name} was built for CUDA {major}, torch {torch.__version__} for "
        f"{torch.version.cuda}"
    )


def _load(path: Path, schemas: tuple[str, ...]) -> str:
    library = torch.library.Library("affkd_kernels", "FRAGMENT")
    for schema in schemas:
        library.define(schema)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load into torch {torch.__version__}: {error}"
    _definitions.append(library)
    return ""


def cuda_architectures() -> list[int]:
    """The compute capabilities, times 10, that the CUDA kernels were compiled for."""
    return [] if load_cuda() else list(torch.ops.affkd_kernels.cuda_architectures())


def usable_capabilities() -> list[str]:
    """The instruction sets for which there are kernels that this processor can run, best last.

    AFFKD_CPU_CAPABILITY picks one; without it the best runs.
    """
    best = torch.ops.affkd_kernels.cpu_capability_index() if not load() else -1
    return list(CAPABILITIES[: best + 1])
