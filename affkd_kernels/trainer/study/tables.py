"""The tables of a study: main effects, and methods beside the baselines and published figures."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from typing import Any

from affkd_kernels.trainer.report import spread
from affkd_kernels.trainer.study.analysis import BASELINES, CaseAnalysis, Difference
from affkd_kernels.trainer.study.results import MethodResult
from affkd_kernels.trainer.study.table import Table

Row = dict[str, Any]
BEST_SHOWN = 12


def effects_table(case: CaseAnalysis) -> Table:
    """What each level of each module adds to the mean of its module's levels."""
    rows = [
        [
            *(comparison.kind, name, f"{found.estimate:+.2f}"),
            *(f"±{found.half_width:.2f}", f"±{found.simultaneous:.2f}", found.verdict),
        ]
        for comparison in case.effects
        for name, found in comparison.differences.items()
    ]
    headings = ["module", "level", "effect", "alone", "of all", "verdict"]
    return Table(f"Main effects: {case.result.title}", headings, rows, left=2)


def effect_rows(case: CaseAnalysis) -> list[Row]:
    """The main effects as numbers, in percentage points."""
    return [
        {**_case(case), "module": comparison.kind, "level": name, **_numbers("effect", found)}
        for comparison in case.effects
        for name, found in comparison.differences.items()
    ]


def methods_table(case: CaseAnalysis, level: str) -> Table:
    """The best triples, the named methods and the baselines, best first.

    Args:
        case: what to show.
        level: what the strength of a method is given as, ``share`` or ``weight``.
    """
    best = {method.name for method in case.triples[:BEST_SHOWN]}
    shown = [m for m in case.ranking if m.triple is None or m.name in best]
    headings = [
        *("method", level, "last epoch", "best epoch", "at"),
        *(f"minus {baseline}" for baseline in BASELINES),
        *("published", "step, ms", "relation"),
    ]
    return Table(
        f"Best triples: {case.result.title}", headings, [_cells(case, method) for method in shown]
    )


def _cells(case: CaseAnalysis, method: MethodResult) -> list[str]:
    epochs, steps, shares = (
        list(figures.values()) for figures in (method.best_epoch, method.step, method.relation)
    )
    return [
        method.name,
        "-" if method.level is None else f"{method.level:g}",
        mean_and_spread(method.last.values()),
        mean_and_spread(method.best.values()),
        f"{statistics.fmean(epochs):.1f}" if epochs else "-",
        *(_difference(case.difference(baseline, method.name)) for baseline in BASELINES),
        "-" if method.published is None else f"{method.published:.2f}",
        f"{statistics.median(steps):.2f}" if steps else "-",
        f"{100 * statistics.median(shares):.1f} %" if shares else "-",
    ]


def _difference(found: Difference | None) -> str:
    return "-" if found is None else f"{found.estimate:+.2f}±{found.half_width:.2f}{found.mark}"


def method_rows(case: CaseAnalysis) -> list[Row]:
    """Every method that finished for a seed, as numbers; accuracies in percent."""
    return [_method_row(case, m) for m in case.result.methods.values() if m.last or m.failures]


def _method_row(case: CaseAnalysis, method: MethodResult) -> Row:
    last, best = list(method.last.values()), list(method.best.values())
    affinity, normalization, loss = method.triple or (None, None, None)
    row = {
        **_case(case),
        "method": method.name,
        "affinity": affinity,
        "normalization": normalization,
        "loss": loss,
        "level": method.level,
        "seeds": len(last),
        "failed": len(method.failures),
        "last": _mean(last),
        "last_deviation": spread(last)[1] if last else None,
        "best": _mean(best),
        "best_deviation": spread(best)[1] if best else None,
        "best_epoch": _mean(list(method.best_epoch.values())),
    }
    for baseline in BASELINES:
        row |= _numbers(f"minus_{baseline.lower()}", case.difference(baseline, method.name))
    return row | {
        "published": method.published,
        "step_milliseconds": _median(method.step.values()),
        "relation_share": _median(method.relation.values()),
    }


def _numbers(name: str, found: Difference | None) -> Row:
    return {
        name: found and found.estimate,
        f"{name}_half_width": found and found.half_width,
        f"{name}_simultaneous": found and found.simultaneous,
        f"{name}_verdict": found and found.verdict,
    }


def _case(case: CaseAnalysis) -> Row:
    given = case.result.case
    return {
        "teacher": given.pair.teacher,
        "student": given.pair.student,
        "setting": given.setting,
        "batch_size": given.batch_size,
        "score": case.result.score,
    }


def mean_and_spread(values: Collection[float]) -> str:
    """Mean and sample standard deviation, the latter left out for a single value."""
    if not values:
        return "-"
    mean, deviation = spread(list(values))
    return f"{mean:.2f}±{deviation:.2f}" if len(values) > 1 else f"{mean:.2f}"


def _mean(values: Collection[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _median(values: Collection[float]) -> float | None:
    return statistics.median(values) if values else None
