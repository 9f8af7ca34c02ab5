"""What a study says in sentences: which of its differences are larger than its noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from affkd_kernels.trainer.grid.config import GridConfig
from affkd_kernels.trainer.study.analysis import Analysis, CaseAnalysis, Comparison, mean

METHOD = """
Scores are those of the last epoch, in percent of the test images, with the standard deviation over
the seeds; "best epoch" is chosen on the test images, so it flatters. "relation" is the relational
terms' part of the time of a step.

All comparisons are between runs of one seed, so what a seed does to all methods cancels in them.
`alone`, and what stands behind a difference, is the half-width of a 95 % interval for one
comparison if it were the only one; `of all` is that of an interval which holds for all comparisons
of this report together with 95 %. `clear` and `*` mark a difference that is larger than the latter,
the verdict `alone` one that is larger than the former only. The intervals are of a bootstrap-t over
seeds: residuals within seeds, pooled over the levels of a module or over the methods; for `of all`
the largest statistic of a family, and Bonferroni among the families. A main effect is that of the
additive model of the triples, by least squares, because not every combination is valid.

The intervals hold for further seeds of these networks, images and lengths of training. They say
nothing of others, and leave out what another choice of strength would have changed: a strength is
chosen once, by the selection seeds, and kept.
"""


def overall(analysis: Analysis) -> Iterator[str]:
    """How much was compared, and what of it chance alone would have brought."""
    found = analysis.differences
    if not found:
        yield "With fewer than two seeds or two methods that finished, nothing tells the noise."
        return
    count = len(found)
    alone, clear = sum(d.suggested for d in found), sum(d.clear for d in found)
    yield (
        f"{count} comparisons, and those of the triples with the best one, in {analysis.families} "
        f"families. If nothing differed, about {0.05 * count:.0f} would seem to differ when each "
        "is looked at alone, and most likely none by the intervals for all together. Alone "
        f"{alone} differ, together {clear} do."
    )


def of_case(case: CaseAnalysis, config: GridConfig) -> Iterator[str]:
    """The sentences of one case."""
    yield from _unfinished(case)
    if case.deviation is None:
        return
    yield from _noise(case)
    yield from map(_effect, case.effects)
    yield from _interplay(case)
    yield from _best(case)
    yield from map(_baseline, case.differences)
    yield from _edge(case, config)


def _unfinished(case: CaseAnalysis) -> Iterator[str]:
    complete = {method.name for method in case.ranking}
    missing = [name for name in case.result.methods if name not in complete]
    if missing:
        yield (
            f"{len(missing)} of {len(case.result.methods)} methods did not finish for every seed "
            f"and are not compared: {_listed(missing)}."
        )


def _noise(case: CaseAnalysis) -> Iterator[str]:
    means = [mean(method) for method in case.ranking]
    text = (
        f"Apart from what a seed does to all, one method varies by {case.deviation:.2f} points "
        f"from seed to seed. The best and the worst of {len(means)} methods lie "
        f"{means[0] - means[-1]:.1f} points apart"
    )
    if case.differences:
        typical, rare = case.differences[0].null_range
        text += f"; were all equal, they still would by {typical:.1f} (in 5 % of cases {rare:.1f})"
    yield text + "."
    if case.uneven:
        yield (
            "Far noisier than the others, so that their intervals are too narrow: "
            f"{_listed(case.uneven)}."
        )


def _effect(effect: Comparison) -> str:
    differences = effect.differences
    above = [name for name, d in differences.items() if d.clear and d.estimate > 0]
    below = [name for name, d in differences.items() if d.clear and d.estimate < 0]
    if not above and not below:
        return f"{effect.kind}: no level stands out from the noise."

    def shown(names: list[str], key: Callable[[str], float]) -> str:
        ordered = sorted(names, key=key, reverse=True)
        return ", ".join(f"{name} ({differences[name].estimate:+.1f})" for name in ordered)

    parts = [
        f"{shown(names, lambda name: abs(differences[name].estimate))} {side} the mean"
        for names, side in ((above, "above"), (below, "below"))
        if names
    ]
    within = len(differences) - len(above) - len(below)
    rest = f"; {within} within the noise" if within else ""
    return f"{effect.kind}: {'; '.join(parts)}{rest}."


def _interplay(case: CaseAnalysis) -> Iterator[str]:
    if case.additive is not None and case.effects:
        yield (
            f"The main effects make up {100 * case.additive:.0f} % of the variance between the "
            "triples; the rest is how particular modules go together, and noise."
        )


def _best(case: CaseAnalysis) -> Iterator[str]:
    if case.triples:
        best = case.triples[0]
        yield (
            f"The best triple is {best.name} with {mean(best):.2f}. "
            f"{len(case.contenders) - 1} other triples of {len(case.triples) - 1} cannot be told "
            "from it."
        )


def _baseline(family: Comparison) -> str:
    found = family.differences.values()
    better = sum(d.clear and d.estimate > 0 for d in found)
    worse = sum(d.clear and d.estimate < 0 for d in found)
    return (
        f"Against {family.kind}: of {len(found)} methods {better} are better beyond the noise, "
        f"{worse} are worse, {len(found) - better - worse} cannot be told from it."
    )


def _edge(case: CaseAnalysis, config: GridConfig) -> Iterator[str]:
    levels = config.levels
    chosen = [method.level for method in case.ranking if method.level is not None]
    if len(levels) < 2 or not chosen:
        return
    what = level_name(config)
    for level, side in ((max(levels), "largest"), (min(levels), "smallest")):
        count = chosen.count(level)
        if count:
            yield (
                f"{count} of {len(chosen)} methods took the {side} {what} that was tried, "
                f"{level:g}: beyond it they may do better."
            )


def level_name(config: GridConfig) -> str:
    """What the strength of a method is given as."""
    return "share" if config.shares else "weight"


def _listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
