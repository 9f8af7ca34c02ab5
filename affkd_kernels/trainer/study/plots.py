"""The pictures of a study, as PNG: a heat map for each loss, main effects with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from affkd_kernels.trainer.study.analysis import CaseAnalysis, Comparison, mean
from affkd_kernels.trainer.study.effects import Triple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

DPI = 120


def heat_map(case: CaseAnalysis, path: Path) -> None:
    """Mean score by affinity and normalization, a panel for each loss.

    All panels share their colors. A combination that is not valid, or did not finish for every
    seed, is blank.
    """
    from matplotlib.figure import Figure

    scores = {m.triple: mean(m) for m in case.triples if m.triple}
    triples = [m.triple for m in case.result.methods.values() if m.triple]
    affinities, normalizations, losses = (
        list(dict.fromkeys(triple[i] for triple in triples)) for i in range(3)
    )
    width = 2.2 + len(losses) * (0.8 + 0.75 * len(normalizations))
    chart = Figure(figsize=(width, 2.2 + 0.45 * len(affinities)), layout="constrained")
    panels = chart.subplots(1, len(losses), sharey=True, squeeze=False)[0]
    for axes, loss in zip(panels, losses, strict=True):
        image = _panel(axes, scores, affinities, normalizations, loss)
    chart.colorbar(image, ax=list(panels), label=_score_label(case))
    chart.suptitle(case.result.title)
    chart.savefig(path, dpi=DPI)


def _panel(
    axes: Axes,
    scores: dict[Triple, float],
    affinities: list[str],
    normalizations: list[str],
    loss: str,
) -> AxesImage:
    grid = np.array(
        [[scores.get((a, n, loss), np.nan) for n in normalizations] for a in affinities]
    )
    # the worst combinations lie so far below that they would leave one color to all others
    low, high = np.quantile(list(scores.values()), 0.1), max(scores.values())
    image = axes.imshow(grid, vmin=low, vmax=high, aspect="auto", cmap="viridis")
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            dark = value < (low + high) / 2
            color = "white" if dark else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color)
    axes.set_title(loss)
    axes.set_xticks(range(len(normalizations)), normalizations, rotation=45, ha="right")
    axes.set_yticks(range(len(affinities)), affinities)
    return image


def effects_plot(case: CaseAnalysis, path: Path) -> None:
    """Each level's difference from the mean of its module, a panel for each module.

    The thick bar is the interval of one comparison alone, the thin one that of all together.
    """
    from matplotlib.figure import Figure

    levels = max(len(effect.differences) for effect in case.effects)
    chart = Figure(figsize=(4.2 * len(case.effects), 1.6 + 0.35 * levels), layout="constrained")
    panels = chart.subplots(1, len(case.effects), squeeze=False)[0]
    for axes, effect in zip(panels, case.effects, strict=True):
        _effects_panel(axes, effect)
    chart.suptitle(f"Main effects, {_score_label(case)}: {case.result.title}")
    chart.savefig(path, dpi=DPI)


def _effects_panel(axes: Axes, effect: Comparison) -> None:
    found = list(effect.differences.values())
    estimates, places = [difference.estimate for difference in found], range(len(found))
    together = [difference.simultaneous for difference in found]
    alone = [difference.half_width for difference in found]
    axes.errorbar(estimates, places, xerr=together, fmt="none", ecolor="0.6", elinewidth=1)
    axes.errorbar(estimates, places, xerr=alone, fmt="o", elinewidth=3)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks(places, list(effect.differences))
    axes.invert_yaxis()
    axes.set(title=effect.kind, xlabel="points from the mean")


def _score_label(case: CaseAnalysis) -> str:
    names = {"test_accuracy": "test accuracy", "neighbor_accuracy": "5-NN accuracy"}
    return f"{names.get(case.result.score, case.result.score)}, %"
