"""Results as Markdown tables. A speed-up stands there only where it may: see :func:`speedup`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .accuracy import ALLOWED_EXTRA, ALLOWED_RATIO
from .floor import FACTORED, PAIRS
from .providers import AUTO, AUTO_EXACT, OURS
from .registry import CHUNKED, COMPILE, EAGER, KEOPS

Record = dict[str, Any]
# the columns of these tables; benchmarks/gpu_tables.py has those of a GPU
BASELINES = (EAGER, COMPILE, CHUNKED, KEOPS)

# the largest extra memory of a tiled algorithm: gradient and scaled gradient, and scratch space
MEMORY_SLACK = 8 << 20
MEMORY_BOUND_FROM = 2048


def median(record: Record, name: str) -> float | None:
    """Seconds of a provider, None where it was not timed."""
    seconds = record["providers"].get(name, {}).get("seconds")
    return seconds and seconds["median"]


def speedup(record: Record, baseline: str, ours: str = AUTO) -> float | None:
    """How many times faster than the baseline, or None.

    None where the A/A control left its band, where the error against float64 was too large or is
    not known, and where either was not timed.
    """
    if record["noisy"] or not record["providers"].get(ours, {}).get("passes"):
        return None
    own, other = median(record, ours), median(record, baseline)
    return other / own if own and other else None


def fastest_baseline(record: Record) -> str | None:
    """The quickest of all that is not ours, further eager forms included."""
    known = {
        name: seconds
        for name in record["providers"]
        if name not in OURS and name not in (PAIRS, FACTORED) and (seconds := median(record, name))
    }
    return min(known, key=lambda name: known[name], default=None)


def speedup_over_fastest(record: Record) -> float | None:
    """As :func:`speedup`, against the quickest baseline of the case."""
    baseline = fastest_baseline(record)
    return None if baseline is None else speedup(record, baseline)


def algorithm(record: Record, name: str = AUTO) -> str:
    """The backend and algorithm that a provider of ours ran, as in "cpp/dense"."""
    if name in (AUTO, f"{AUTO}-again", AUTO_EXACT):
        return (record["plan"] or "fused").partition(":")[0]
    options = OURS[name]
    return "/".join((options["backend"], options.get("algorithm", "dense")))


def floor_share(record: Record, name: str = AUTO) -> float | None:
    """Floor over time: 1 would be nothing but matrix products; None where either is unknown."""
    factored = algorithm(record, name).endswith("/factored")
    floor, own = median(record, FACTORED if factored else PAIRS), median(record, name)
    return floor / own if floor and own and not record["noisy"] else None


def case_line(record: Record) -> str:
    """One line for the terminal."""
    parts = [
        f"{record['name']:40}",
        f"{algorithm(record):16}",
        f"{show_time(median(record, AUTO)):>8}",
    ]
    for name in BASELINES:
        if median(record, name):
            parts.append(f"{name} {show_ratio(speedup(record, name))}")
    parts.append(f"floor {_percent(floor_share(record))}")
    if record["allocator"] != "default":
        parts.append(f"({record['allocator']} allocator)")
    if record["noisy"]:
        ratio = record["control_ratio"]
        parts.append("noisy" + (f": A/A {ratio:.2f}" if ratio else ": no control"))
    if record["providers"].get(AUTO, {}).get("passes") is False:
        parts.append("ERROR TOO LARGE")
    return "  ".join(parts)


def summary(records: Sequence[Record]) -> str:
    """Geometric means and worst ratios by regime and allocator."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["regime"], record["allocator"]), []).append(record)
    rows = []
    for (regime, allocator), group in groups.items():
        quiet = sum(not record["noisy"] for record in group)
        row = [regime, allocator, f"{quiet} of {len(group)}"]
        row += [_spread([speedup(r, name) for r in group], show_ratio) for name in BASELINES[:3]]
        row.append(_spread([speedup_over_fastest(r) for r in group], show_ratio))
        row.append(_spread([floor_share(r) for r in group], _percent))
        row.append(_megabytes(max(filter(None, (_bytes_of(r, AUTO) for r in group)), default=None)))
        rows.append(row)
    header = ["regime", "allocator", "quiet cases", *(f"vs {name}" for name in BASELINES[:3])]
    return table([*header, "vs the fastest of all", "share of the floor", "peak memory"], rows)


def times(records: Sequence[Record]) -> str:
    """Every case: median (p20 to p80) times, speed-ups and the share of the floor."""
    rows = []
    for record in records:
        row = [_label(record), algorithm(record), show_time(_own_floor(record))]
        row += [_quantiles(record, name) for name in (AUTO, *BASELINES)]
        row += [show_ratio(speedup(record, name)) for name in BASELINES[:2]]
        row.append(_fastest(record))
        row.append("noisy" if record["noisy"] else _percent(floor_share(record)))
        rows.append(row)
    header = ["case", "runs", "floor", "ours", *BASELINES]
    return table([*header, "vs eager", "vs compile", "vs fastest", "of the floor"], rows)


def algorithms(records: Sequence[Record]) -> str:
    """The time of each of our algorithms, and of further eager forms."""
    extras = sorted(
        {
            name
            for record in records
            for name in record["providers"]
            if name.startswith("eager-") or (name in OURS and not name.startswith(AUTO))
        }
    )
    kept = [name for name in extras if any(median(record, name) for record in records)]
    rows = []
    for record in records:
        others = [show_time(median(record, name)) for name in kept]
        if any(cell != _NOTHING for cell in others):
            own = f"{show_time(median(record, AUTO))} ({algorithm(record)})"
            rows.append([_label(record), own, *others])
    return table(["case", AUTO, *kept], rows)


def memory(records: Sequence[Record]) -> str:
    """Extra peak memory, and whether the tiled algorithm keeps to its bound."""
    names = [*BASELINES[:3], AUTO, "cpp-tiled", "triton-tiled"]
    known = [r for r in records if any(_bytes_of(r, name) is not None for name in names)]
    kept = [n for n in names if any(_bytes_of(r, n) is not None for r in known)]
    rows = []
    for record in known:
        cells = [_megabytes(_bytes_of(record, name)) for name in kept]
        bound, verdict = memory_verdict(record)
        rows.append([record["name"], algorithm(record), *cells, _megabytes(bound), verdict])
    return table(["case", "auto runs", *kept, "bound", "tiled within"], rows)


def memory_bound(record: Record) -> int | None:
    """2 B D 4 bytes + 8 MB for a self-affinity of at least 2048 items, else None."""
    matrices, queries, keys, length = record["extent"]
    if queries != keys or queries < MEMORY_BOUND_FROM:
        return None
    return 2 * matrices * queries * length * 4 + MEMORY_SLACK


def memory_verdict(record: Record) -> tuple[int | None, str]:
    """The bound, and "yes" or "no" for the tiled algorithm, "-" where it was not measured."""
    bound = memory_bound(record)
    names = [
        n for n in (AUTO, "cpp-tiled", "triton-tiled") if algorithm(record, n).endswith("tiled")
    ]
    used = [size for name in names if (size := _bytes_of(record, name)) is not None]
    if bound is None or not used:
        return bound, _NOTHING
    return bound, "yes" if max(used) <= bound else "no"


def accuracy(records: Sequence[Record]) -> str:
    """By method and algorithm: the worst errors, beside those of the baseline in the same case."""
    worst: dict[tuple[str, str], list[tuple[Record, str]]] = {}
    for record in records:
        for name, provider in record["providers"].items():
            usable = name in OURS and name != f"{AUTO}-again" and record["allocator"] == "default"
            if usable and provider.get("error"):
                key = (record["method"], algorithm(record, name))
                worst.setdefault(key, []).append((record, name))
    rows = []
    for (method, runs), entries in sorted(worst.items()):
        row = [method, runs, str(len(entries))]
        for part in ("loss", "gradient"):
            record, name = max(entries, key=lambda e: e[0]["providers"][e[1]]["error"][part])
            baseline = _baseline_error(record)
            own = record["providers"][name]["error"][part]
            row += [f"{own:.1e}", f"{baseline[part]:.1e}" if baseline else _NOTHING]
        judged = [record["providers"][name]["passes"] for record, name in entries]
        row.append(f"{sum(map(bool, judged))} of {len(judged)}")
        rows.append(row)
    header = ["method", "runs", "cases", "loss", "eager's there", "gradient", "eager's there"]
    note = (
        f"Relative to float64. A case passes where both errors are at most {ALLOWED_RATIO:g} times "
        f"the float32 baseline's own plus {ALLOWED_EXTRA:g}.\n\n"
    )
    return note + table([*header, "pass"], rows)


def overhead(measured: Record) -> str:
    """The cost of a call without its kernel."""
    rows = [
        [name, f"{1e6 * timing['median']:.1f}", _extra(measured, name)]
        for name, timing in measured["seconds"].items()
    ]
    return table(["call", "us", "beyond x.sum(), us"], rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; what are no names is aligned to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_NOTHING = "-"


def _label(record: Record) -> str:
    return record["name"] + ("" if record["allocator"] == "default" else " (tuned)")


def _fastest(record: Record) -> str:
    ratio = speedup_over_fastest(record)
    return f"{show_ratio(ratio)} ({fastest_baseline(record)})" if ratio else _NOTHING


def _own_floor(record: Record) -> float | None:
    return median(record, FACTORED if algorithm(record).endswith("/factored") else PAIRS)


def _bytes_of(record: Record, name: str) -> int | None:
    return record["providers"].get(name, {}).get("extra_bytes")


def _baseline_error(record: Record) -> dict[str, float] | None:
    errors = (p["error"] for name, p in record["providers"].items() if name not in OURS)
    return next((error for error in errors if error), None)


def _extra(measured: Record, name: str) -> str:
    seconds = measured["extra_seconds"].get(name)
    return _NOTHING if seconds is None else f"{1e6 * seconds:.1f}"


def _spread(values: Sequence[float | None], show: Any) -> str:
    """The geometric mean, and the worst."""
    known = [value for value in values if value]
    if not known:
        return _NOTHING
    mean = math.exp(sum(map(math.log, known)) / len(known))
    return f"{show(mean)} (worst {show(min(known))})"


def show_time(seconds: float | None) -> str:
    if not seconds:
        return _NOTHING
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _quantiles(record: Record, name: str) -> str:
    seconds = record["providers"].get(name, {}).get("seconds")
    if not seconds:
        return _NOTHING
    low, high = (show_time(seconds[quantile]) for quantile in ("p20", "p80"))
    return f"{show_time(seconds['median'])} ({low} to {high})"


def show_ratio(value: float | None) -> str:
    return f"{value:.2f}x" if value else _NOTHING


def _percent(value: float | None) -> str:
    return f"{100 * value:.0f} %" if value else _NOTHING


def _megabytes(size: int | None) -> str:
    return _NOTHING if size is None else f"{size / 2**20:.1f} MB"
