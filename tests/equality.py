"""How far 2 and 4 gloo processes are from one, losses and training: `python tests/equality.py`.

The largest relative difference of each kind, over all that test_distributed.py and
test_trainer_processes.py compare.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

# the package of this checkout, installed or not
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import trainer_cases
from distributed_checks import MODULES
from ranks import results

SIZES = (2, 4)


def loss_figures() -> dict[str, list[float]]:
    """By dtype and what was compared, a figure for each number of processes."""
    figures: dict[str, list[float]] = {}
    for size in SIZES:
        for what, value in results(MODULES, size)["figures"].items():
            figures.setdefault(what, []).append(value)
    return figures


def training_figures() -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer_cases.prepare(folder)
        for size in SIZES:
            trainer_cases.train_in(folder, size)
            for case in trainer_cases.cases(folder):
                for what, value in trainer_cases.deviation(folder, case, size).items():
                    figures.setdefault(f"affkd train, {case}: {what}", []).append(value)
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"| largest relative difference | {' | '.join(f'{n} processes' for n in SIZES)} |")
    print("|---|" + "---|" * len(SIZES))
    for what, values in {**loss_figures(), **training_figures()}.items():
        print(f"| {what} | {' | '.join(f'{value:.1e}' for value in values)} |")
