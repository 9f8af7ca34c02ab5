"""Show results: ``python -m benchmarks.report [RESULTS.json ...]`` prints Markdown.

``--update docs/performance.md`` puts it between the markers of that page, ``--plots DIRECTORY``
draws the plots. Without files it takes all of benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from . import gpu_tables, tables

RESULTS = Path(__file__).parent / "results"
PART = "benchmarks"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 where there is nothing to show."""
    options = _parser().parse_args(arguments)
    files = options.results or sorted(RESULTS.glob("*.json"))
    if not files:
        print(f"no results: run python -m benchmarks.run --json {RESULTS.name}/cpu.json first")
        return 2
    results = [load(path) for path in files]
    plots: list[list[Path]] = [[] for _ in files]
    if options.plots:
        from .plots import draw

        options.plots.mkdir(parents=True, exist_ok=True)
        drawn = zip(results, files, strict=True)
        plots = [draw(result, options.plots, path.stem) for result, path in drawn]
    base = options.update.parent if options.update else Path.cwd()
    text = "\n\n".join(
        section(result, paths, base) for result, paths in zip(results, plots, strict=True)
    )
    if options.update:
        options.update.write_text(insert(options.update.read_text(), text))
    else:
        print(text)
    return 0


def load(path: Path) -> dict[str, Any]:
    """The results of one run.

    Raises:
        ValueError: a file of another schema.
    """
    from .run import SCHEMA

    result: dict[str, Any] = json.loads(path.read_text())
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {result.get('schema')!r}, this report reads {SCHEMA}")
    return result


def section(result: dict[str, Any], plots: list[Path], base: Path) -> str:
    """One run as Markdown."""
    if "rates" in result:
        return _gpu_section(result)
    records = result["cases"]
    parts = [f"## Suite `{result['suite']}`", _machine(result)]
    parts += ["### By regime", tables.summary(records)]
    parts += [f"![{path.stem}]({_relative(path, base)})" for path in plots]
    parts += ["### Every case", tables.times(records)]
    parts += ["### By algorithm", tables.algorithms(records)]
    parts += ["### Extra peak memory", tables.memory(records)]
    parts += ["### Accuracy", tables.accuracy(records)]
    parts += ["### Overhead of a call", tables.overhead(result["overhead"])]
    return "\n\n".join(parts + _left_out(result))


def _gpu_section(result: dict[str, Any]) -> str:
    records, rates = result["cases"], result["rates"]
    parts = [f"## Suite `{result['suite']}`", _machine(result)]
    parts += ["### What this GPU does at best", gpu_tables.rates_table(rates)]
    parts += ["### Every case", gpu_tables.results(records, rates)]
    parts += ["### Accuracy", tables.accuracy(records)]
    parts += ["### Overhead of a call", tables.overhead(result["overhead"])]
    return "\n\n".join(parts + _left_out(result))


def _left_out(result: dict[str, Any]) -> list[str]:
    left_out = [f"{name} failed: {reason}" for name, reason in result.get("failed", {}).items()]
    if result["not_run"]:
        left_out.append(f"Out of time, not run: {', '.join(result['not_run'])}.")
    return left_out


def insert(page: str, text: str, part: str = PART) -> str:
    """The page with the text between the markers of a part.

    Raises:
        ValueError: the page lacks a marker.
    """
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    for marker in (begin, end):
        if page.count(marker) != 1:
            raise ValueError(
                f"the page must have {marker!r} once, it has it {page.count(marker)} times"
            )
    head, rest = page.split(begin)
    return f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    commit = (machine["commit"] or "unknown")[:12]
    modified = ", with uncommitted changes" if machine["modified"] else ""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    minutes = result["seconds"] / 60
    lines = [
        f"- command: `{result['command']}`, {result['started']}, {minutes:.1f} minutes",
        f"- processor: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['instruction_set']}, load at the start "
        f"{machine['load_at_start']:.2f}",
        f"- versions: Python {machine['python']}, {versions}",
        f"- commit: {commit}{modified}",
    ]
    if "gpu" in machine:
        lines.append(
            f"- GPU: {machine['gpu']}, CUDA {machine['cuda']}, float32 matrix products at "
            f"{machine['float32_matmul_precision']!r} precision"
        )
    return "\n".join(lines)


def _relative(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="files that benchmarks.run wrote")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="a page with the markers")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="where to draw plots")
    return parser


if __name__ == "__main__":
    sys.exit(main())
