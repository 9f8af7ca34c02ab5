"""What a call costs besides its kernel: validation, planning, dispatch and the autograd engine.

The kernel is replaced by one that returns constants, and the rest is compared with the cheapest
thing that autograd can do at all, ``x.sum()`` forward and backward.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.kernels import lookup
from affkd_kernels.kernels.result import LossAndGrad, PlainCall

from .measure import interleaved

SHAPE = (64, 64)
TRIPLE = ("gram", "row_l2", "mse")
# seconds beyond x.sum(), forward and backward
LIMIT = 25e-6


def measure_overhead(seconds: float = 2.0, rounds: int = 2000) -> dict[str, Any]:
    """Medians of the bare calls, and what the module's adds to ``x.sum()``, in seconds."""
    student, teacher = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    backend, algorithm, _ = affkd.explain_plan(student, teacher, *TRIPLE)
    if backend == "reference":
        backend, algorithm = "torch", "factored"
    fixed: dict[str, Any] = {"backend": backend, "algorithm": algorithm}
    module = affkd.AffinityLoss(*TRIPLE, **fixed)

    def step(loss: Tensor) -> None:
        torch.autograd.grad(loss, student)

    steps = {
        "x.sum()": lambda: step(student.sum()),
        "module": lambda: step(module(student, teacher)),
        "function": lambda: step(affkd.affinity_loss(student, teacher, *TRIPLE, **fixed)),
    }
    constant = {(backend, student.device.type): _constant_kernel(student)}
    with mock.patch.dict(lookup.loaded, constant):
        timings = interleaved(steps, seconds, max_rounds=rounds)
    extra = {name: timings[name].median - timings["x.sum()"].median for name in steps}
    return {
        "seconds": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
        "extra_seconds": {name: value for name, value in extra.items() if name != "x.sum()"},
        "limit_seconds": LIMIT,
        "within": extra["module"] <= LIMIT,
    }


def _constant_kernel(student: Tensor) -> types.ModuleType:
    gradient = torch.zeros_like(student)
    kernel = types.ModuleType("constant")

    def loss_and_grad(*_: Any) -> LossAndGrad:
        # a loss of its own for every call, since autograd marks it as an output
        return LossAndGrad(gradient.new_zeros(()), gradient)

    def plain_call(*_: Any) -> PlainCall:
        return lambda *_: (gradient.new_zeros(()), gradient)

    kernel.loss_and_grad = loss_and_grad  # type: ignore[attr-defined]
    kernel.plain_call = plain_call  # type: ignore[attr-defined]
    kernel.available = lambda device_type: (True, "")  # type: ignore[attr-defined]
    return kernel


def main() -> None:
    measured = measure_overhead()
    for name, timing in measured["seconds"].items():
        print(f"{name:10} {1e6 * timing['median']:7.1f} us")
    extra = 1e6 * measured["extra_seconds"]["module"]
    print(f"a module call adds {extra:.1f} us to x.sum(), of {1e6 * LIMIT:.0f} us allowed")


if __name__ == "__main__":
    main()
