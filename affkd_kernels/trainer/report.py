"""What is shown: progress as lines, the demo's results as a table and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Result:
    """One trained student. Accuracies in percent; ``accuracy`` is None where no term trains the
    head, ``loss_milliseconds`` where the method has no distillation term."""

    setting: str
    method: str
    seed: int
    accuracy: float | None
    neighbor_accuracy: float
    seconds: float
    loss_milliseconds: float | None


@dataclass(frozen=True)
class Column:
    """One column of figures: ``figure`` names the field of ``Result`` that is averaged."""

    setting: str
    figure: str
    title: str


def progress_line(record: dict[str, Any]) -> str:
    """One record, as a run hands it to its observer, as a line to read."""
    if record["kind"] == "gradient_shares":
        return _shares_line(record)
    role = "teacher" if record.get("teacher") else "student"
    place = f"{role}  epoch {record['epoch']:>3}  step {record['step']:>6}"
    if record["kind"] == "evaluation":
        neighbors = record.get("neighbor_accuracy")
        voted = "" if neighbors is None else f"5-NN {neighbors:.1f} %  "
        accuracy = f"test accuracy {record['test_accuracy']:.1f} %"
        return f"{place}  {accuracy}  {voted}{record['seconds']:.1f} s"
    terms = "  ".join(f"{name} {float(value):.4g}" for name, value in record["terms"].items())
    return f"{place}  {terms}"


def _shares_line(record: dict[str, Any]) -> str:
    shares = "  ".join(f"{name} {100 * share:.3g} %" for name, share in record["shares"].items())
    warnings = "".join(f"\nwarning: {text}" for text in record["warnings"])
    return f"gradient shares in the first batch: {shares}{warnings}"


def append_result(path: Path, result: Result) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read_results(path: Path) -> list[Result]:
    """What ``append_result`` wrote; empty where nothing was finished."""
    if not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, the latter 0 for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation


def figures(results: Sequence[Result], method: str, column: Column) -> list[float]:
    """The figures of one cell of the table, one a seed."""
    chosen = [r for r in results if (r.method, r.setting) == (method, column.setting)]
    values = [getattr(result, column.figure) for result in chosen]
    return [value for value in values if value is not None]


def rows(results: Sequence[Result], columns: Sequence[Column], seeds: int) -> list[list[str]]:
    """The cells as text, a row for each method in the order of first appearance."""
    methods = dict.fromkeys(result.method for result in results)
    return [[method, *_row(results, method, columns, seeds)] for method in methods]


def _row(
    results: Sequence[Result], method: str, columns: Sequence[Column], seeds: int
) -> list[str]:
    cells = [_cell(figures(results, method, column), seeds) for column in columns]
    times = [r.loss_milliseconds for r in results if r.method == method and r.loss_milliseconds]
    return [*cells, f"{statistics.median(times):.2f}" if times else "-"]


def _cell(values: Sequence[float], seeds: int) -> str:
    if not values:
        return "-"
    mean, deviation = spread(values)
    missing = f" ({len(values)} of {seeds})" if len(values) < seeds else ""
    return f"{mean:.1f}±{deviation:.1f}{missing}"


def headings(columns: Sequence[Column]) -> list[str]:
    return ["student", *(f"{c.setting}: {c.title}" for c in columns), "loss, ms"]


def rich_table(results: Sequence[Result], columns: Sequence[Column], seeds: int) -> Table:
    """The table for a terminal."""
    first, *others = headings(columns)
    # 80 columns suffice when the headings wrap and the figures do not
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading.replace(": ", "\n"), justify="right", min_width=len("12.3±4.5"))
    for row in rows(results, columns, seeds):
        table.add_row(*row)
    return table


def markdown_table(results: Sequence[Result], columns: Sequence[Column], seeds: int) -> str:
    """The same table in Markdown."""
    head = headings(columns)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows(results, columns, seeds)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(results: Sequence[Result], columns: Sequence[Column], path: Path) -> None:
    """Every mean with its standard deviation over the seeds, a panel for each figure, as a PNG."""
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(result.method for result in results))
    titles = list(dict.fromkeys(column.title for column in columns))
    chart = Figure(figsize=(11, 1.6 + 0.4 * len(methods)), layout="constrained")
    for axes, title in zip(chart.subplots(1, len(titles), sharey=True), titles, strict=True):
        for column in columns:
            if column.title == title:
                _points(axes, results, methods, column)
        axes.set(title=title, xlabel="percent of the test images")
        axes.set_yticks(range(len(methods)), methods)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    axes.invert_yaxis()
    chart.savefig(path, dpi=120)


def _points(axes: Axes, results: Sequence[Result], methods: Sequence[str], column: Column) -> None:
    cells = {i: figures(results, method, column) for i, method in enumerate(methods)}
    present = {i: spread(values) for i, values in cells.items() if values}
    axes.errorbar(
        [mean for mean, _ in present.values()],
        list(present),
        xerr=[deviation for _, deviation in present.values()],
        fmt="o",
        capsize=3,
        label=column.setting,
    )
