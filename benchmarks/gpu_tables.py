"""The results of a GPU as one Markdown table, and what the machine does at best."""

from __future__ import annotations

from collections.abc import Sequence

from .providers import AUTO, AUTO_AGAIN, AUTO_EXACT, EAGER_FAST, EAGER_FLOAT
from .rates import FLOOR_GRAPH, FLOOR_OPS, PRODUCTS
from .registry import CHUNKED, COMPILE, EAGER, LIGER, MAX_AUTOTUNE, METHODS
from .single import QUIET
from .tables import Record, algorithm, show_ratio, show_time, table

_NOTHING = "-"
_COMPILED = (COMPILE, MAX_AUTOTUNE)
_WALLS = (
    *("factored", "cpp-dense", "cpp-tiled", "triton-dense", "triton-tiled", AUTO_EXACT),
    *(EAGER, EAGER_FAST, EAGER_FLOAT, COMPILE, MAX_AUTOTUNE, CHUNKED, LIGER),
)
_HEADER = (
    *("case", "runs", "ours, wall", "ours, device"),
    *_WALLS,
    *("vs eager", "vs compiled", "launches", "as empty ops", "as an empty graph"),
    *("MB, ours", "MB, eager", "TFLOP/s", "of the products' peak", "of the copy bandwidth"),
    *("loss error", "eager's", "gradient error", "eager's"),
)


def wall(record: Record, name: str) -> float | None:
    """Seconds of a call by the clock, where calls follow each other."""
    timing = record["providers"].get(name, {}).get("wall")
    return timing and timing["median"]


def device(record: Record, name: str) -> float | None:
    """Seconds of a call between two events on the GPU, which was idle and its cache cold."""
    timing = record["providers"].get(name, {}).get("seconds")
    return timing and timing["median"]


def noisy(record: Record) -> bool:
    """Whether ours, measured twice, differs: on the device or by the clock."""
    own, again = wall(record, AUTO), wall(record, AUTO_AGAIN)
    same = bool(own and again and QUIET[0] <= own / again <= QUIET[1])
    return bool(record["noisy"]) or not same


def speedup(record: Record, baselines: Sequence[str]) -> float | None:
    """Of the wall time over the fastest of some baselines; None where it may not be told.

    That is where the A/A control left its band, or the error is too large or not known.
    """
    known = [seconds for name in baselines if (seconds := wall(record, name))]
    own = wall(record, AUTO)
    allowed = not noisy(record) and record["providers"][AUTO]["passes"]
    return min(known) / own if known and own and allowed else None


def useful_flops(record: Record) -> float:
    """Of the products that nobody gets around; see benchmarks/floor.py."""
    matrices, queries, keys, length = record["extent"]
    if algorithm(record).endswith("/factored"):
        return 8.0 * matrices * queries * length**2
    # two halves of a Gram matrix and one product, or with keys two whole ones and one or two
    products = 3 + METHODS[record["method"]].trained_keys if _has_keys(record) else 2
    return 2.0 * products * matrices * queries * keys * length


def useful_bytes(record: Record) -> float:
    """Features of both sides read once, and the gradient written once."""
    matrices, queries, keys, length = record["extent"]
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}[record["dtype"]]
    rows = 3 * queries
    if _has_keys(record):
        rows += (2 + METHODS[record["method"]].trained_keys) * keys
    return float(itemsize * matrices * rows * length)


def peak_of(record: Record) -> str:
    """The product whose measured rate a case is held to."""
    if record["dtype"] != "float32":
        return "bfloat16"
    return "float32" if record["precision"] == "highest" else "tf32"


def results(records: Sequence[Record], rates: dict[str, float]) -> str:
    """One row a case."""
    return table(_HEADER, [_row(record, rates) for record in records])


def rates_table(rates: dict[str, float]) -> str:
    header = ["copy, TB/s", *(f"{name}, TFLOP/s" for name in PRODUCTS)]
    return table(header, [[f"{rates[name] / 1e12:.3g}" for name in ("copy", *PRODUCTS)]])


def case_line(record: Record) -> str:
    """One line for the terminal."""
    own = f"{show_time(wall(record, AUTO))} wall, {show_time(device(record, AUTO))} device"
    ratios = (
        f"eager {show_ratio(speedup(record, (EAGER,)))}, "
        f"compiled {show_ratio(speedup(record, _COMPILED))}"
    )
    notes = "".join(
        f"\n    {name}: {provider['skipped']}"
        for name, provider in record["providers"].items()
        if provider["skipped"]
    )
    control = "  noisy" if noisy(record) else ""
    return f"{record['name']:32} {algorithm(record):15} {own:30} {ratios}{control}{notes}"


def _row(record: Record, rates: dict[str, float]) -> list[str]:
    providers, own = record["providers"], wall(record, AUTO)
    eager = EAGER if EAGER in providers else None
    row = [record["name"], algorithm(record), show_time(own), show_time(device(record, AUTO))]
    row += [show_time(wall(record, name)) for name in _WALLS]
    row += [show_ratio(speedup(record, (EAGER,))), show_ratio(speedup(record, _COMPILED))]
    row.append(_or_nothing(providers[AUTO]["launches"]))
    row += [show_time(wall(record, name)) for name in (FLOOR_OPS, FLOOR_GRAPH)]
    row += [_megabytes(record, AUTO), _megabytes(record, eager)]
    row += _shares(record, rates, device(record, AUTO))
    for part in ("loss", "gradient"):
        row += [_error(record, AUTO, part), _error(record, eager, part)]
    return row


def _shares(record: Record, rates: dict[str, float], seconds: float | None) -> list[str]:
    if not seconds or not METHODS[record["method"]].pairs:
        return [_NOTHING] * 3
    flops, moved = useful_flops(record) / seconds, useful_bytes(record) / seconds
    return [
        f"{flops / 1e12:.3g}",
        f"{100 * flops / rates[peak_of(record)]:.0f} % of {peak_of(record)}",
        f"{100 * moved / rates['copy']:.1f} %",
    ]


def _has_keys(record: Record) -> bool:
    _, queries, keys, _ = record["extent"]
    return queries != keys or "bank" in record["name"]


def _megabytes(record: Record, name: str | None) -> str:
    size = record["providers"][name]["extra_bytes"] if name else None
    return _NOTHING if size is None else f"{size / 2**20:.1f}"


def _error(record: Record, name: str | None, part: str) -> str:
    error = record["providers"][name]["error"] if name else None
    return f"{error[part]:.1e}" if error else _NOTHING


def _or_nothing(value: object) -> str:
    return _NOTHING if value is None else str(value)
