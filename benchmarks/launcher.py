"""What the launcher of the Triton kernels costs the host: ``python -m benchmarks.launcher``.

No GPU is needed. Kernels are compiled for one, loaded into a stand-in for the CUDA driver that
computes nothing, and launched: what is left is the Python of a call of loss and gradient. What the
real driver takes for a launch comes on top. The exit status is 1 where a call takes longer than the
launcher may.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels.result import Needs
from affkd_kernels.presets import preset

from .report import insert
from .tables import table

SOURCE = Path(__file__).parent / "stand_in_driver.c"
METHODS = ("sp", "pkt", "rkd_distance", "rbf_frobenius", "cka", "irg_edge", "seed", "minilm_v2")
# of an H100
ARCHITECTURE = (90, 132)
# seconds of Python that a call may take
LIMIT = 30e-6


@contextmanager
def stand_in_driver() -> Iterator[ctypes.CDLL]:
    """Triton over the stand-in, for tensors of a CPU; yields the stand-in."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-w", SOURCE, "-o", library],
            check=True,
        )
        driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        driver.stand_in_launches.restype = ctypes.c_int64
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder):
            _activate()
            _keep_freed_memory()
            yield driver


def _keep_freed_memory() -> None:
    """As a GPU's allocator does: what the system takes for pages is no part of a call."""
    standard = ctypes.CDLL(None)
    trim_threshold, map_threshold = -1, -3
    for option in (trim_threshold, map_threshold):
        standard.mallopt(option, 1 << 30)


def _activate() -> None:
    """Makes Triton believe in a GPU, and this package that the CPU is one."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from affkd_kernels.kernels.triton import configs

    found = CudaDriver()
    major, minor = divmod(ARCHITECTURE[0], 10)
    found.get_current_device = lambda: 0  # type: ignore[method-assign]
    found.get_current_stream = lambda device: 0  # type: ignore[method-assign]
    found.get_device_capability = lambda device=0: (major, minor)  # type: ignore[method-assign]
    driver.set_active(found)
    configs.architecture = functools.cache(lambda device: ARCHITECTURE)  # type: ignore[assignment]


def step_of(method: str, items: int, length: int) -> Callable[[], Any]:
    """A call of loss and gradient, below the public face."""
    from affkd_kernels.kernels import triton as kernels

    spec = preset(method).spec
    keys: dict[str, Any] = {}
    shape: tuple[int, ...] = (items, length)
    if spec.items == "tokens":
        shape = (4, 2, items // 4, length // 8)
    if method == "seed":
        bank = torch.randn(2, 4 * items, length)
        keys = {"student_keys": bank[0], "teacher_keys": bank[1]}
    student, teacher = torch.randn(2, *shape)
    inputs, _ = canonical_inputs(spec, student, teacher, **keys)
    return lambda: kernels.loss_and_grad(spec, inputs, Needs(), "dense")


def seconds_of(step: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """The first decile and the median of single calls, without the collector's pauses."""
    for _ in range(rounds // 10 + 2):
        step()
    samples = []
    gc.disable()
    try:
        for _ in range(rounds):
            start = time.perf_counter()
            step()
            samples.append(time.perf_counter() - start)
    finally:
        gc.enable()
    deciles = statistics.quantiles(samples, n=10)
    return deciles[0], deciles[4]


def measure(methods: tuple[str, ...], items: int, length: int, rounds: int) -> list[list[str]]:
    """Rows of a table: the loss, its launches, and microseconds of a call."""
    rows = []
    with stand_in_driver() as driver:
        for method in methods:
            step = step_of(method, items, length)
            step()
            before = driver.stand_in_launches()
            step()
            count = driver.stand_in_launches() - before
            rows.append([method, f"{count}", *(f"{1e6 * x:.1f}" for x in seconds_of(step, rounds))])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launcher", description=__doc__)
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--update", type=Path, metavar="PAGE", help="a page with the markers")
    parser.add_argument("methods", nargs="*", default=METHODS)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and the interpreter launches nothing")
    rows = measure(tuple(options.methods), options.items, options.length, options.rounds)
    text = table(["loss", "launches", "us a call, first decile", "us a call, median"], rows)
    print(f"{options.items} x {options.length}, Python {sys.version.split()[0]}\n{text}")
    if options.update:
        options.update.write_text(insert(options.update.read_text(), text, "launcher"))
    return 1 if any(float(row[2]) > 1e6 * LIMIT for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
