"""Loads the compiled kernels on first use, and says why where there are none.

The schemas of the compiled operators are defined here; the binary holds implementations only.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

# another build of the same kernels, such as the one with sanitizers, is named by its path
LIBRARY = Path(
    os.environ.get("AFFKD_CPU_LIBRARY") or Path(__file__).resolve().parent.parent / "_cpu.abi3.so"
)

_CALL = (
    "(Tensor student, Tensor teacher, Tensor? student_keys, Tensor? teacher_keys, Tensor? mask, "
    "Tensor? key_mask, Tensor? pair_mask, Tensor? row_weight, int[] choices, float[] numbers)"
)
_SCHEMAS = (
    f"cpu_loss_and_grad{_CALL} -> (Tensor, Tensor?, Tensor?, Tensor?)",
    f"cpu_row_losses{_CALL} -> Tensor",
    "cpu_angle(Tensor student_squared, Tensor student_inverse, Tensor teacher_squared, "
    "Tensor teacher_inverse, float beta, bool need_slope) -> (Tensor, Tensor)",
    "cpu_capability_index() -> int",
    "cpu_exponential(Tensor x) -> Tensor",
    "cpu_log_ratio(Tensor a, Tensor b) -> Tensor",
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
    library = torch.library.Library("affkd_kernels", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} does not load into torch {torch.__version__}: {error}"
    _definitions.append(library)
    return ""


def usable_capabilities() -> list[str]:
    """The instruction sets for which there are kernels that this processor can run, best last.

    AFFKD_CPU_CAPABILITY picks one; without it the best runs.
    """
    best = torch.ops.affkd_kernels.cpu_capability_index() if not load() else -1
    return list(CAPABILITIES[: best + 1])
