"""Where one algorithm overtakes another: ``python -m benchmarks.crossover``.

Prints the thresholds that affkd_kernels/dispatch.py keeps, as measured on this machine:
``FACTORED_FROM``, items per feature from which the factored form beats the best algorithm over
pairs, and ``DENSE_BYTES_SHORT``, the size of the two affinity matrices up to which keeping them
beats computing them again where the features are short. Where they are long it always does, and
``DENSE_BYTES`` bounds the memory.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from affkd_kernels import dispatch

from .inputs import make_inputs
from .measure import interleaved
from .providers import Unavailable, make_provider
from .registry import Case
from .tables import table

FACTORED, DENSE, TILED, REFERENCE = "factored", "cpp-dense", "cpp-tiled", "reference"

# items per feature, and feature lengths, at which the factored form is tried
RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
LENGTHS = (64, 128, 256)
FACTORED_METHODS = ("sp", "cka", "gram_anchor")
# batches and lengths at which keeping the matrices is compared with computing them again
BATCHES = (1024, 1536, 2048, 2896, 4096, 5792)
LONG = 512
DENSE_METHODS = ("sp", "rkd_distance", "rbf_frobenius")
# larger matrices would not fit a workspace anybody wants
MAX_ITEMS = 6000


class Point(NamedTuple):
    """One measured size, and how many times faster the challenger is there."""

    size: float
    ratio: float


def crossover(points: Sequence[Point]) -> float | None:
    """The smallest size from which the challenger wins everywhere, None where it never does.

    Between the last size lost and the first one won the ratio is taken to be a line in the
    logarithms of both.
    """
    ordered = sorted(points)
    lost = [i for i, point in enumerate(ordered) if point.ratio < 1]
    if not lost:
        return ordered[0].size if ordered else None
    if lost[-1] == len(ordered) - 1:
        return None
    low, high = ordered[lost[-1]], ordered[lost[-1] + 1]
    step = math.log(low.ratio) / (math.log(low.ratio) - math.log(high.ratio))
    return low.size * (high.size / low.size) ** step


def compare(
    method: str, shape: tuple[int, int], challenger: str, holders: Sequence[str], seconds: float
) -> float | None:
    """The fastest holder's median over the challenger's, None where one of them cannot run."""
    case = Case(method, shape, "crossover", ())
    inputs = make_inputs(case)
    steps: dict[str, Any] = {}
    for name in (challenger, *holders):
        try:
            provider = make_provider(name, case)
            provider.step(inputs)
        except (Unavailable, RuntimeError):
            continue
        steps[name] = lambda provider=provider: provider.step(inputs)
    if challenger not in steps or len(steps) < 2:
        return None
    medians = {name: timing.median for name, timing in interleaved(steps, seconds).items()}
    own = medians.pop(challenger)
    return min(medians.values()) / own


def factored_from(holders: Sequence[str], seconds: float) -> float | None:
    """Items per feature; the median over methods and feature lengths."""
    found = []
    for method in FACTORED_METHODS:
        for length in LENGTHS:
            points = []
            for ratio in RATIOS:
                items = round(ratio * length)
                if items <= MAX_ITEMS:
                    value = compare(method, (items, length), FACTORED, holders, seconds)
                    points += [] if value is None else [Point(ratio, value)]
            name = f"{method}, D = {length}: factored against {' and '.join(holders)}"
            found.append(_show(name, points))
    return _median(found)


def dense_bytes(length: int, seconds: float) -> float | None:
    """Bytes of the two affinity matrices; the median over methods."""
    found = []
    for method in DENSE_METHODS:
        points = []
        for items in BATCHES:
            value = compare(method, (items, length), TILED, (DENSE,), seconds)
            points += [] if value is None else [Point(8.0 * items**2, value)]
        found.append(_show(f"{method}, D = {length}: tiled against dense, by bytes", points))
    return _median(found)


def _show(name: str, points: list[Point]) -> float | None:
    sizes, ratios = ([f"{p.size:.3g}" for p in points], [f"{p.ratio:.2f}x" for p in points])
    value = crossover(points)
    print(f"{name}\n\n{table(sizes, [ratios])}\n")
    print("never\n" if value is None else f"from {value:.3g}\n", flush=True)
    return value


def _median(values: Sequence[float | None]) -> float | None:
    """None counts as larger than everything, and a median of it is no threshold."""
    ordered = sorted(math.inf if value is None else value for value in values)
    middle = ordered[len(ordered) // 2] if ordered else math.inf
    return None if math.isinf(middle) else middle


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crossover", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size")
    parser.add_argument("--threads", type=int, help="of torch; the default is torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    fused = factored_from((DENSE, TILED), options.seconds)
    reference = factored_from((REFERENCE,), options.seconds)
    short = dense_bytes(dispatch.SHORT, options.seconds)
    long = dense_bytes(LONG, options.seconds)
    print("measured here, against what affkd_kernels/dispatch.py has:")
    print(f"FACTORED_FROM = {_literal(fused, reference)}")
    print(f"    has         {dispatch.FACTORED_FROM}")
    for name, size, has in (
        ("DENSE_BYTES_SHORT", short, dispatch.DENSE_BYTES_SHORT),
        ("DENSE_BYTES", long, dispatch.DENSE_BYTES),
    ):
        measured = "tiled is never faster" if size is None else f"{size / 2**20:.0f} << 20"
        print(f'{name}["cpu"] = {measured}')
        print(f"    has {has['cpu'] >> 20} << 20")


def _literal(fused: float | None, reference: float | None) -> str:
    shown = {
        name: "inf" if value is None else f"{value:.2g}"
        for name, value in (("fused", fused), ("reference", reference))
    }
    return "{" + ", ".join(f'"{name}": {value}' for name, value in shown.items()) + "}"


if __name__ == "__main__":
    main()
