"""Measure a suite: ``python -m benchmarks.run --suite quick --json results.json``."""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import gpu_tables, tables
from .gpu import measure_on_gpu
from .machine import describe_machine
from .overhead import measure_overhead
from .rates import measure_rates
from .registry import SUITES, Case, select
from .single import CaseRecord, measure_case, measure_tuned

SCHEMA = 1
# seconds after which the times with another allocator are given up
TUNED_TIMEOUT = 240.0


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 where the suite cannot run here."""
    options = _parser().parse_args(arguments)
    suite = "factored" if options.factored else options.suite
    device = "cuda" if suite == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        print("suite 'gpu' needs a CUDA device, and there is none here")
        return 2
    try:
        cases = select(suite, options.only)
    except ValueError as error:
        print(error)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    _quieten()
    if options.verbose:
        logging.basicConfig(format="%(asctime)s %(message)s")
        logging.getLogger("benchmarks").setLevel(logging.INFO)
    result = {
        "schema": SCHEMA,
        "suite": suite,
        "command": _command(options, suite),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
    }
    minutes = SUITES[suite] if options.minutes is None else options.minutes
    result |= _measure(cases, device, minutes, options, result)
    if device == "cuda":
        print(f"\n{gpu_tables.rates_table(result['rates'])}\n")
        print(gpu_tables.results(result["cases"], result["rates"]))
    if options.json:
        print(f"written: {options.json}")
    return 0


def _measure(
    cases: list[Case],
    device: str,
    minutes: float,
    options: argparse.Namespace,
    result: dict[str, Any],
) -> dict[str, Any]:
    """The measurements, which are written to the file as they come."""
    started = time.monotonic()

    def left() -> float:
        return 60 * minutes - (time.monotonic() - started)

    measured: dict[str, Any] = {"overhead": measure_overhead(), "cases": [], "not_run": []}
    measured |= {"failed": {}} | ({"rates": measure_rates()} if device == "cuda" else {})
    for number, case in enumerate(cases, 1):
        if left() <= 0:
            measured["not_run"].append(case.name)
            continue
        try:
            records = _records(case, device, options, left)
        except (MemoryError, RuntimeError) as error:
            measured["failed"][case.name] = str(error)
            print(f"{case.name} failed: {error}")
            continue
        for record in records:
            measured["cases"].append(record.as_json())
            line = (gpu_tables if device == "cuda" else tables).case_line(measured["cases"][-1])
            print(f"[{number}/{len(cases)}] {line}", flush=True)
        # a run that is cut short keeps what it has
        _write(options.json, result | measured | {"seconds": time.monotonic() - started})
    if measured["not_run"]:
        print(f"out of time, not run: {', '.join(measured['not_run'])}")
    measured["seconds"] = time.monotonic() - started
    _write(options.json, result | measured)
    return measured


def _records(
    case: Case, device: str, options: argparse.Namespace, left: Callable[[], float]
) -> list[CaseRecord]:
    if device == "cuda":
        return [measure_on_gpu(case, left)]
    record = measure_case(case, memory=options.memory, baselines=options.baselines)
    if not (case.tuned and options.tuned and sys.platform == "linux"):
        return [record]
    tuned = measure_tuned(case, record, timeout=min(TUNED_TIMEOUT, max(left(), 30.0)))
    if isinstance(tuned, str):
        print(f"{case.name} with the tuned allocator failed: {tuned}")
        return [record]
    return [record, tuned]


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def _command(options: argparse.Namespace, suite: str) -> str:
    parts = ["python", "-m", "benchmarks.run", "--suite", suite]
    parts += ["--only", options.only] if options.only else []
    parts += ["--threads", str(options.threads)] if options.threads else []
    parts += [] if options.baselines else ["--no-baselines"]
    parts += [] if options.memory else ["--no-memory"]
    parts += [] if options.tuned else ["--no-tuned"]
    return shlex.join(parts)


def _quieten() -> None:
    # torch.compile's advice about baselines is no news in a benchmark of them
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    suites = parser.add_mutually_exclusive_group()
    suites.add_argument("--suite", choices=sorted(SUITES), default="quick")
    suites.add_argument("--factored", action="store_true", help="the same as --suite factored")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name matches, as in 'sp-*'")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write the results")
    parser.add_argument("--threads", type=int, help="of torch; the default is torch's own choice")
    parser.add_argument("--minutes", type=float, help="start no case after this; see SUITES")
    parser.add_argument("--verbose", action="store_true", help="say what a case is busy with")
    for name, what in (
        ("baselines", "what others write and the errors against float64,"),
        ("memory", "peak memory"),
        ("tuned", "the tuned allocator's times"),
    ):
        flag = argparse.BooleanOptionalAction
        parser.add_argument(f"--{name}", action=flag, default=True, help=f"measure {what} too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
