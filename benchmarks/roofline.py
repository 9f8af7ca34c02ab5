"""What a GPU should take, by its data sheet: ``python -m benchmarks.roofline [--gpu NAME]``.

Estimates, not measurements. Each launch takes the longer of its arithmetic, at the share of the
peak that such kernels reach and that its blocks can fill, and of its traffic, and two microseconds
to begin; launches follow each other. What the host needs is not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .report import insert
from .tables import show_time, table


class Gpu(NamedTuple):
    """A data sheet: processors, dense TFLOP/s by product, TB/s of memory and of the L2 cache."""

    processors: int
    float32: float
    tf32: float
    bfloat16: float
    float64: float
    memory: float
    cache: float
    cache_megabytes: int


GPUS = {
    "H100 SXM": Gpu(132, 67, 495, 989, 67, 3.35, 5.5, 50),
    "A100 SXM 80 GB": Gpu(108, 19.5, 156, 312, 19.5, 2.04, 4.0, 40),
    "RTX 5090": Gpu(170, 105, 105, 210, 1.6, 1.79, 6.0, 96),
}
# the share of the peak: of plain multiply-adds, and of tensor cores
_FMA, _TENSOR = 0.6, 0.5
_LAUNCH = 2e-6
# the sides of a tile: small ones where larger would leave processors idle
_TILE, _SMALL_TILE, _SMALL = 64, 32, 1024
PRECISIONS = ("ieee", "tf32x3", "bfloat16")


class Launch(NamedTuple):
    """Floating-point operations of a kernel's products, the bytes that it moves, its blocks."""

    flops: float
    moved: float
    blocks: float


class Estimate(NamedTuple):
    """An algorithm on one size: its launches, and what it holds besides features and gradient."""

    name: str
    launches: list[Launch]
    held: float


def _blocks(rows: int, columns: int) -> float:
    tile = _SMALL_TILE if rows <= _SMALL else _TILE
    return max(1, rows / tile) * max(1, columns / tile)


def dense(items: int, length: int) -> Estimate:
    """Half of each symmetric Gram matrix, the rows' statistics, and V X with V in place of A_s."""
    gram, matrix = 2.0 * items**2 * length, 4.0 * items**2
    features, blocks = 4.0 * items * length, _blocks(items, items)
    launches = [
        Launch(gram, 2 * features + 2 * matrix, blocks),
        Launch(0, 2 * matrix, items),
        Launch(gram, 3 * matrix + 2 * features, _blocks(items, length)),
    ]
    return Estimate("dense", launches, 2 * matrix)


def tiled(items: int, length: int, sweeps: int, panel: float = 64e6) -> Estimate:
    """Sweeps that recompute both Gram matrices; V goes through a panel of rows."""
    gram, matrix = 2.0 * items**2 * length, 4.0 * items**2
    features, blocks = 4.0 * items * length, _blocks(items, items)
    panels = max(1, round(matrix / panel))
    before = [Launch(2 * gram, 2 * features, blocks)] * (sweeps - 1)
    write = Launch(2 * gram / panels, 2 * features + matrix / panels, blocks / panels)
    product = Launch(
        gram / panels, matrix / panels + 2 * features, _blocks(items // panels, length)
    )
    return Estimate(f"tiled, {sweeps} sweeps", before + [write, product] * panels, matrix / panels)


def factored(items: int, length: int) -> Estimate:
    """Three moments, the rows' sums and their gradient, two weighted moments, and theirs."""
    moment, features = 2.0 * items * length**2, 4.0 * items * length
    launches = [Launch(k * moment, 2 * features, items / _TILE) for k in (3, 3, 2, 2)]
    return Estimate("factored", launches, 6 * 8.0 * length**2)


def eager(items: int, length: int) -> Estimate:
    """Two Gram matrices, the two products of their gradient, and some twenty passes over B x B."""
    gram, matrix = 2.0 * items**2 * length, 4.0 * items**2
    products = [Launch(gram, matrix, _blocks(items, items))] * 2
    products += [Launch(gram, matrix, _blocks(items, length))] * 2
    return Estimate("eager", products + [Launch(0, 2 * matrix, items)] * 16, 8 * matrix)


def seconds(gpu: Gpu, estimate: Estimate, precision: str, working_set: float) -> float:
    """Of one forward and backward; ``working_set`` bytes decide between cache and memory."""
    rate = {
        "ieee": _FMA * gpu.float32,
        "tf32x3": _TENSOR * max(gpu.tf32 / 3, gpu.float32 * _FMA / _TENSOR),
        "bfloat16": _TENSOR * gpu.bfloat16,
    }[precision]
    bandwidth = gpu.cache if working_set <= 1e6 * gpu.cache_megabytes else gpu.memory
    total = 0.0
    for launch in estimate.launches:
        filled = min(1.0, launch.blocks / gpu.processors)
        arithmetic = launch.flops / (filled * rate * 1e12)
        total += _LAUNCH + max(arithmetic, launch.moved / (bandwidth * 1e12))
    return total


def estimates(items: int, length: int) -> list[Estimate]:
    """The algorithms worth a line at that size, eager last."""
    if items >= 1 << 17:
        return [factored(items, length)]
    if 8.0 * items**2 <= 256e6:
        return [dense(items, length), tiled(items, length, 2), eager(items, length)]
    return [tiled(items, length, 2), tiled(items, length, 3), eager(items, length)]


def roofline(name: str, sizes: Iterable[tuple[int, int]]) -> str:
    """The Markdown table of a GPU."""
    gpu, rows = GPUS[name], []
    for items, length in sizes:
        for estimate in estimates(items, length):
            flops = sum(launch.flops for launch in estimate.launches)
            working_set = estimate.held + 12.0 * items * length
            times = (seconds(gpu, estimate, p, working_set) for p in PRECISIONS)
            rows.append(
                [
                    f"{items} x {length}",
                    estimate.name,
                    str(len(estimate.launches)),
                    f"{flops / 1e9:.3g}",
                    f"{estimate.held / 2**20:.3g}",
                    *(f"{show_time(time)}" for time in times),
                ]
            )
    header = ["items x length", "algorithm", "launches", "GFLOP", "MB held"]
    return table([*header, *(f"{p}, estimated" for p in PRECISIONS)], rows)


SIZES = ((64, 512), (256, 512), (1024, 512), (4096, 512), (32768, 512), (1 << 20, 512))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="H100 SXM")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="a page with the markers")
    options = parser.parse_args()
    text = f"{options.gpu}, from its data sheet. Estimated, not measured.\n\n"
    text += roofline(options.gpu, SIZES)
    if options.update:
        options.update.write_text(insert(options.update.read_text(), text, "roofline"))
    else:
        print(text)


if __name__ == "__main__":
    main()
