"""What every kernel takes on every GPU architecture, read from the machine code, and its budget."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest
from binary import Resources, resources
from stand_in import PHASES

from affkd_kernels.kernels import extension

LIBRARY = extension.CUDA_LIBRARY
reason = extension.load_cuda()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)

# registers of a thread, in float and in double. Of 65,536 registers, blocks of 256 threads leave
# room for 4 blocks a multiprocessor at 64, 3 at 80, 2 at 128, 1 at 255
REGISTERS = {
    "gram": (128, 168),
    "means": (176, 176),
    "statistics": (128, 128),
    "count": (80, 80),
    "rows": (128, 216),
    "centered_rows": (128, 216),
    "center": (80, 128),
    "product": (128, 248),
    "angle": (80, 128),
    "angle_sum": (40, 40),
}
# for products there is a kernel a precision: ieee, tf32x3 and tf32 in float, and ieee in double
NUMBER = {phase: 4 if phase in ("gram", "product") else 2 for phase in PHASES}
NUMBER |= {"centered_rows": 2, "angle": 2, "angle_sum": 1}


def kind_and_width(kernel: str) -> tuple[str, int]:
    """What the kernel does, and 0 for float or 1 for double, from its mangled name."""
    found = re.search(r"\d([a-z_]+)_kernelI([fd])", kernel)
    assert found is not None, kernel
    return found[1], "fd".index(found[2])


@pytest.fixture(scope="module")
def kernels() -> list[Resources]:
    return resources(LIBRARY)


def test_every_kernel_is_there_on_every_architecture(kernels: list[Resources]) -> None:
    seen: dict[int, Counter[str]] = defaultdict(Counter)
    for kernel in kernels:
        seen[kernel.architecture][kind_and_width(kernel.kernel)[0]] += 1
    assert sorted(seen) == extension.cuda_architectures()
    for counted in seen.values():
        assert counted == NUMBER


def test_no_kernel_spills_registers(kernels: list[Resources]) -> None:
    """What is spilled lies on the stack, and so would an array that cannot be kept in registers."""
    assert not [kernel for kernel in kernels if kernel.stack or kernel.local]


def test_registers_are_within_budget(kernels: list[Resources]) -> None:
    over = []
    for kernel in kernels:
        kind, width = kind_and_width(kernel.kernel)
        if kernel.registers > REGISTERS[kind][width]:
            over.append(kernel)
    assert not over


def test_shared_memory_is_dynamic(kernels: list[Resources]) -> None:
    """All but what the driver reserves: how much a launch asks for is checked at compile time."""
    assert max(kernel.shared for kernel in kernels) <= 1024
