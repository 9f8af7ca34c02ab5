"""The plots of a report: speed-up by shape, memory by batch, share of the floor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from .providers import AUTO, BASELINES  # noqa: E402
from .tables import Record, floor_share, memory_bound, speedup  # noqa: E402

_MEGABYTE = 1 << 20


def draw(result: dict[str, Any], directory: Path, stem: str) -> list[Path]:
    """Draw what the results allow, as PNG files named after ``stem``."""
    records = [record for record in result["cases"] if record["allocator"] == "default"]
    plots: dict[str, Callable[[Axes, list[Record]], bool]] = {
        "speedup": _speedups,
        "memory": _memory,
        "floor": _floor_shares,
    }
    return [
        path
        for name, plot in plots.items()
        if (path := _figure(directory / f"{stem}-{name}.png", plot, records))
    ]


def _figure(
    path: Path, plot: Callable[[Axes, list[Record]], bool], records: list[Record]
) -> Path | None:
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    try:
        if not plot(axes, records):
            return None
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(path, dpi=120)
        return path
    finally:
        pyplot.close(figure)


def _speedups(axes: Axes, records: list[Record]) -> bool:
    """One dot a case, by shape in order of size; a dot above 1 is faster than the baseline."""
    shapes = _by_shape(records)
    drawn = False
    for baseline, offset in zip(BASELINES[:3], (-0.2, 0.0, 0.2), strict=True):
        dots = [
            (position + offset, ratio)
            for position, group in enumerate(shapes.values())
            for record in group
            if (ratio := speedup(record, baseline))
        ]
        if dots:
            axes.plot(*zip(*dots, strict=True), "o", markersize=4, label=f"against {baseline}")
            drawn = True
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), list(shapes), rotation=30, ha="right", fontsize="small")
    axes.set_ylabel("times faster")
    return drawn


def _memory(axes: Axes, records: list[Record]) -> bool:
    """Extra peak memory by the number of items, for the self-affinities of samples."""
    of_samples = [r for r in records if len(r["shape"]) == 2 and r["extent"][1] == r["extent"][2]]
    drawn = False
    for name in (*BASELINES[:3], AUTO, "cpp-tiled", "triton-tiled"):
        dots = [
            (record["shape"][0], size / _MEGABYTE)
            for record in of_samples
            if (size := record["providers"].get(name, {}).get("extra_bytes"))
        ]
        if dots:
            axes.plot(*zip(*sorted(dots), strict=True), "o", markersize=4, label=name)
            drawn = True
    bounds = {(r["shape"][0], memory_bound(r)) for r in of_samples if memory_bound(r)}
    if drawn and bounds:
        dots = [(items, bound / _MEGABYTE) for items, bound in sorted(bounds) if bound]
        axes.plot(*zip(*dots, strict=True), "k_", markersize=12, label="bound of the tiled path")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("items B")
    axes.set_ylabel("extra peak memory, MB")
    return drawn


def _floor_shares(axes: Axes, records: list[Record]) -> bool:
    """The part of the time that matrix products alone would take."""
    shapes = _by_shape(records)
    methods: dict[str, list[tuple[int, float]]] = {}
    for position, group in enumerate(shapes.values()):
        for record in group:
            if share := floor_share(record):
                methods.setdefault(record["method"], []).append((position, 100 * share))
    for method, dots in methods.items():
        axes.plot(*zip(*dots, strict=True), "o", markersize=4, label=method)
    axes.set_xticks(range(len(shapes)), list(shapes), rotation=30, ha="right", fontsize="small")
    axes.set_ylabel("share of the floor, %")
    axes.set_ylim(bottom=0)
    return bool(methods)


def _by_shape(records: list[Record]) -> dict[str, list[Record]]:
    """The cases by shape, in order of the work that a pair algorithm has."""

    def work(record: Record) -> int:
        matrices, queries, keys, length = record["extent"]
        return matrices * queries * keys * length

    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=work):
        groups.setdefault("x".join(map(str, record["shape"])), []).append(record)
    return groups
