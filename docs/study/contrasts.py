"""What the report's main effects cannot say: contrasts between groups of triples.

    python docs/study/contrasts.py

prints the table of README.md in this folder from results.csv beside it. A contrast is the mean over
one group's triples minus that over the other's, within each seed; its interval is Student's over
the seeds.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).with_name("results.csv")
# two-sided 95 % quantile of Student's distribution by degrees of freedom
QUANTILES = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

# affinities of unit vectors, which no scale of the features changes
BOUNDED = {"cosine", "rbf(gamma=0.4)", "polynomial(degree=2, unit=True)"}
# normalizations that no common factor of the affinities changes
SCALE_FREE = {"row_l2", "row_l1", "frobenius"}


class Triple(NamedTuple):
    affinity: str
    normalization: str
    loss: str

    @property
    def bounded(self) -> bool:
        return self.affinity in BOUNDED

    @property
    def scaled(self) -> bool:
        """Whether the scale of the features still counts."""
        return not self.bounded and self.normalization not in SCALE_FREE


Scores = dict[Triple, dict[str, float]]
Group = Callable[[Triple], bool]

CONTRASTS: tuple[tuple[str, Group, Group], ...] = (
    (
        "the features' scale does not count, minus: it counts",
        lambda t: not t.scaled,
        lambda t: t.scaled,
    ),
    (
        "distances minus gram, where a normalization removes the scale",
        lambda t: "euclidean" in t.affinity and t.normalization in SCALE_FREE and t.loss != "kl",
        lambda t: t.affinity == "gram" and t.normalization in SCALE_FREE,
    ),
    (
        "unit affinities minus distances, both normalized to no scale",
        lambda t: t.bounded and t.normalization in SCALE_FREE and t.loss != "kl",
        lambda t: "euclidean" in t.affinity and t.normalization in SCALE_FREE and t.loss != "kl",
    ),
    (
        "normalized minus not, unit affinities",
        lambda t: t.bounded and t.normalization != "none" and t.loss != "kl",
        lambda t: t.bounded and t.normalization == "none",
    ),
    (
        "softmax minus the other normalizations, unit affinities",
        lambda t: t.bounded and t.normalization == "softmax" and t.loss != "kl",
        lambda t: t.bounded and t.normalization in SCALE_FREE and t.loss != "kl",
    ),
    (
        "l1 minus mse, where no scale counts",
        lambda t: not t.scaled and t.loss == "l1",
        lambda t: not t.scaled and t.loss == "mse",
    ),
    (
        "l1 minus mse, softmax of distances and gram",
        lambda t: t.scaled and t.normalization == "softmax" and t.loss == "l1",
        lambda t: t.scaled and t.normalization == "softmax" and t.loss == "mse",
    ),
    (
        "kl minus mse, softmax of unit affinities",
        lambda t: t.bounded and t.normalization == "softmax" and t.loss == "kl",
        lambda t: t.bounded and t.normalization == "softmax" and t.loss == "mse",
    ),
)


def main() -> None:
    settings = read_scores()
    print(f"| contrast | {' | '.join(settings)} |\n| --- |{' ---: |' * len(settings)}")
    for name, one, other in CONTRASTS:
        cells = [_cell(contrast(scores, one, other)) for scores in settings.values()]
        print(f"| {name} | {' | '.join(cells)} |")


def read_scores() -> dict[str, Scores]:
    """By setting: the last epoch's score of every triple and seed, in percent."""
    settings: dict[str, Scores] = defaultdict(lambda: defaultdict(dict))
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["stage"] == "final" and row["affinity"]:
                triple = Triple(row["affinity"], row["normalization"], row["loss"])
                settings[row["setting"]][triple][row["seed"]] = float(row["last"])
    return settings


def contrast(scores: Scores, one: Group, other: Group) -> list[float]:
    """By seed: the mean over the triples of a group minus that over the triples of another."""
    seeds = sorted({seed for by_seed in scores.values() for seed in by_seed})

    def mean(group: Group, seed: str) -> float:
        return statistics.fmean(by_seed[seed] for t, by_seed in scores.items() if group(t))

    return [mean(one, seed) - mean(other, seed) for seed in seeds]


def _cell(differences: list[float]) -> str:
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = QUANTILES[len(differences) - 1] * error
    return f"{statistics.fmean(differences):+.1f}±{half:.1f}"


if __name__ == "__main__":
    main()
