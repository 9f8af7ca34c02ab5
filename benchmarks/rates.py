"""What this GPU does at best, measured in the same run: copies, matrix products, launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .measure import Timing, WallTimer, interleaved

_COPIED_BYTES = 1 << 30
_SIZE = 8192
# of the products, by the name of the dtype or of the mode
PRODUCTS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
    "float64": (torch.float64, "highest"),
}
FLOOR_OPS, FLOOR_GRAPH = "floor-ops", "floor-graph"


def measure_rates(seconds: float = 1.0) -> dict[str, float]:
    """Bytes per second of a copy (read and written), and FLOP per second of square products."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    steps: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for name, (dtype, precision) in PRODUCTS.items():
        steps[name] = _product(dtype, precision)
    work = {"copy": 2.0 * _COPIED_BYTES} | dict.fromkeys(PRODUCTS, 2.0 * _SIZE**3)
    timings = interleaved(steps, seconds, timer=WallTimer())
    return {name: work[name] / timing.median for name, timing in timings.items()}


def _product(dtype: torch.dtype, precision: str) -> Callable[[], Tensor]:
    x, y = (torch.randn(_SIZE, _SIZE, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(x)

    def step() -> Tensor:
        torch.set_float32_matmul_precision(precision)
        return torch.mm(x, y, out=out)

    return step


def launch_floors(launches: int) -> dict[str, Callable[[], Any]]:
    """Steps that do nothing in so many launches: each from Python, and all in one CUDA graph.

    Both are an ``autograd.Function`` with its backward, as a fused loss is one.
    """
    leaf = torch.zeros(1, device="cuda", requires_grad=True)
    target = torch.zeros(1, device="cuda")

    def each() -> None:
        for _ in range(launches):
            target.zero_()

    graph = torch.cuda.CUDAGraph()
    each()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        each()
    return {
        FLOOR_OPS: lambda: torch.autograd.grad(_Nothing.apply(leaf, each), leaf),
        FLOOR_GRAPH: lambda: torch.autograd.grad(_Nothing.apply(leaf, graph.replay), leaf),
    }


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, launch: Callable[[], None]) -> Tensor:
        launch()
        return leaf.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_empty(1), None


def count_launches(step: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills that a call puts on the GPU; None where nothing can be traced."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
            step()
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    on_device = [event for event in traced.events() if event.device_type == DeviceType.CUDA]
    return len(on_device) or None


def bursts(
    steps: dict[str, Callable[[], Any]], single: dict[str, Timing], seconds: float
) -> dict[str, Timing]:
    """Wall times per call where calls follow each other, as they do in training.

    A burst takes about ten milliseconds, between two moments at which the GPU is idle.
    """
    calls = {name: max(1, min(50, int(0.01 / single[name].median))) for name in steps}

    def burst(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls[name]):
                steps[name]()

        return run

    timings = interleaved({name: burst(name) for name in steps}, seconds, timer=WallTimer())
    return {name: timing.scaled(1 / calls[name]) for name, timing in timings.items()}
