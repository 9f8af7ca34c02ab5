"""A trial of the tile units of AMX: ``python -m benchmarks.amx``.

Compiles amx.cpp, which takes one block of the kernels' matrix products both by their vector units
and by the tile units, and prints how the times compare. The kernels themselves do not use AMX.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .machine import describe_machine
from .report import insert
from .tables import table

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"),
    *("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
    *("-mamx-tile", "-mamx-bf16"),
)
# what has as many parts of bfloat16
TYPES = {1: "bfloat16", 3: "float32"}


class Trial(NamedTuple):
    """One block by both kinds of units; errors in units of the largest sum."""

    left: str
    right: str
    products: int
    vector_seconds: float
    tile_seconds: float
    vector_error: float
    tile_error: float


class NoTileUnits(RuntimeError):
    """The trial cannot run here; says why."""


def measure() -> list[Trial]:
    """The trial's results.

    Raises:
        NoTileUnits: no compiler that knows them, or no processor that has them.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "amx"))
        _run([*os.environ.get("CXX", "g++").split(), *FLAGS, str(SOURCE), "-o", program])
        return [_trial(line) for line in _run([program]).splitlines()]


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise NoTileUnits(f"{command[0]} was not found") from error
    except subprocess.CalledProcessError as error:
        raise NoTileUnits(error.stderr.strip()) from error


def _trial(line: str) -> Trial:
    left, right, *numbers = line.split()
    parts = (int(left), int(right))
    # of the products of parts those that are above the rounding of float32
    products = sum(a + b < 3 for a in range(parts[0]) for b in range(parts[1]))
    return Trial(TYPES[parts[0]], TYPES[parts[1]], products, *map(float, numbers))


def summary(trials: list[Trial]) -> str:
    """The results as Markdown."""
    header = [
        "left x right",
        "products of bfloat16",
        "vector units",
        "tile units",
        "gain",
        "error, vector units",
        "error, tile units",
    ]
    rows = [
        [
            f"{trial.left} x {trial.right}",
            str(trial.products),
            f"{trial.vector_seconds * 1e6:.0f} us",
            f"{trial.tile_seconds * 1e6:.0f} us",
            f"{trial.vector_seconds / trial.tile_seconds:.2f}x",
            f"{trial.vector_error:.1e}",
            f"{trial.tile_error:.1e}",
        ]
        for trial in trials
    ]
    return f"{describe_machine()['processor']}, one thread.\n\n{table(header, rows)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.amx", description=__doc__)
    parser.add_argument("--update", type=Path, metavar="PAGE", help="a page with the markers")
    options = parser.parse_args()
    try:
        text = summary(measure())
    except NoTileUnits as error:
        print(error, file=sys.stderr)
        return 1
    if options.update:
        options.update.write_text(insert(options.update.read_text(), text, "amx"))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
