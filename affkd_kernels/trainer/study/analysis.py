"""Which comparisons a study makes, and what comes of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from affkd_kernels.trainer.study.bootstrap import (
    Intervals,
    Noise,
    estimate_noise,
    intervals,
    pair_margins,
)
from affkd_kernels.trainer.study.effects import Triple, additive_part, module_maps
from affkd_kernels.trainer.study.results import CaseResult, MethodResult, StudyResult

Array = NDArray[np.float64]
BASELINES = ("CE", "KD")
DRAWS = 10_000
# methods are many: fewer draws give the same digits, in less memory
METHOD_DRAWS = 4_000
# a deviation that three seeds reach by chance once in ten thousand methods
UNEVEN = 3.0


@dataclass(frozen=True)
class Difference:
    """One comparison, in percentage points.

    Args:
        estimate: the difference of means over the seeds.
        half_width: of the interval for this comparison looked at alone.
        simultaneous: of the interval that holds together with those of the whole study.
    """

    estimate: float
    half_width: float
    simultaneous: float

    @property
    def suggested(self) -> bool:
        """Larger than the noise if it were the only comparison of the study."""
        return abs(self.estimate) > self.half_width

    @property
    def clear(self) -> bool:
        """Larger than the noise of all comparisons together."""
        return abs(self.estimate) > self.simultaneous

    @property
    def verdict(self) -> str:
        return "clear" if self.clear else "alone" if self.suggested else "-"

    @property
    def mark(self) -> str:
        """The verdict where there is room for a character only."""
        return "*" if self.clear else ""


@dataclass(frozen=True)
class Comparison:
    """One family.

    Args:
        kind: a module, whose levels are compared with their mean, or a baseline, with which every
            other method is compared.
        differences: by level or method.
        null_range: how far the best of these lies above the worst where all are equal: the median
            and the 95th percentile over draws of the seeds, in percentage points.
    """

    kind: str
    differences: dict[str, Difference]
    null_range: tuple[float, float]


@dataclass(frozen=True)
class CaseAnalysis:
    """One case of the study.

    Args:
        ranking: the complete methods, best mean first.
        deviation: of a method at one seed, pooled over all, in percentage points.
        uneven: methods whose own deviation is far above that.
        contenders: the triples that cannot be told from the best one, itself included.
        additive: the part of the variance between the triples that the main effects make up.
    """

    result: CaseResult
    ranking: list[MethodResult]
    effects: list[Comparison]
    differences: list[Comparison]
    deviation: float | None = None
    uneven: list[str] = field(default_factory=list)
    contenders: list[str] = field(default_factory=list)
    additive: float | None = None

    @property
    def families(self) -> list[Comparison]:
        return [*self.effects, *self.differences]

    @property
    def triples(self) -> list[MethodResult]:
        return [method for method in self.ranking if method.triple]

    def difference(self, baseline: str, method: str) -> Difference | None:
        """Of a method and a baseline, None where they were not compared."""
        found = (c.differences.get(method) for c in self.differences if c.kind == baseline)
        return next(found, None)


@dataclass(frozen=True)
class Analysis:
    """All cases; ``families`` share the permitted error of the simultaneous intervals."""

    cases: list[CaseAnalysis]
    families: int

    @property
    def differences(self) -> list[Difference]:
        """Every comparison of the study but those of pairs of methods."""
        families = (family for case in self.cases for family in case.families)
        return [found for family in families for found in family.differences.values()]


def mean(method: MethodResult) -> float:
    """Over the seeds, of the last epoch."""
    return float(np.mean(list(method.last.values())))


def analyze(study: StudyResult, seed: int = 0) -> Analysis:
    """Every comparison of the study, from draws that ``seed`` repeats."""
    families = max(1, sum(_families(case) for case in study.cases))
    generator = np.random.default_rng(seed)
    cases = [_analyze_case(case, families, generator) for case in study.cases]
    return Analysis(cases, families)


def _families(case: CaseResult) -> int:
    """Modules, baselines, and the pairs of methods, as far as two seeds tell their noise."""
    complete = case.complete()
    if len(case.seeds) < 2 or len(complete) < 2:
        return 0
    baselines = sum(method.name in BASELINES for method in complete)
    return len(module_maps(_triples(complete)[0])) + baselines + 1


def _triples(methods: Sequence[MethodResult]) -> tuple[list[Triple], list[int]]:
    """The triples among the methods, and where they stand."""
    found = [(method.triple, i) for i, method in enumerate(methods) if method.triple]
    return [triple for triple, _ in found], [i for _, i in found]


def _analyze_case(case: CaseResult, families: int, generator: np.random.Generator) -> CaseAnalysis:
    methods = case.complete()
    ranking = sorted(methods, key=mean, reverse=True)
    if not _families(case):
        return CaseAnalysis(case, ranking, [], [])
    scores = case.scores(methods)  # [S, M]
    noise = estimate_noise(scores, np.ones(len(methods)), generator, METHOD_DRAWS)
    names = [method.name for method in methods]
    triples, places = _triples(methods)
    own = scores[:, places]  # [S, T]
    return CaseAnalysis(
        case,
        ranking,
        list(_module_effects(triples, own, families, generator)),
        list(_baseline_differences(names, scores, noise, families)),
        noise.pooled,
        [name for name, spread in zip(names, noise.own, strict=True) if _far(spread, noise)],
        _contenders(methods, places, noise, families),
        additive_part(triples, own.mean(0)),
    )


def _far(spread: float, noise: Noise) -> bool:
    return bool(spread > UNEVEN * noise.pooled)


def _contenders(
    methods: Sequence[MethodResult], places: Sequence[int], noise: Noise, families: int
) -> list[str]:
    if not places:
        return []
    best = max(places, key=lambda place: mean(methods[place]))
    margins = pair_margins(noise, best, families)
    behind = {place: mean(methods[best]) - mean(methods[place]) for place in places}
    return [methods[place].name for place, gap in behind.items() if gap <= margins[place]]


def _module_effects(
    triples: Sequence[Triple], scores: Array, families: int, generator: np.random.Generator
) -> Iterator[Comparison]:
    for found in module_maps(triples):
        values = scores @ found.rows.T  # [S, levels]
        noise = estimate_noise(values, found.scales, generator, DRAWS)
        count = len(found.levels)
        contrasts = np.eye(count) - 1 / count
        result = intervals(values, contrasts, noise, families)
        yield _comparison(found.module, found.levels, result, noise)


def _baseline_differences(
    names: Sequence[str], scores: Array, noise: Noise, families: int
) -> Iterator[Comparison]:
    for baseline in BASELINES:
        if baseline in names:
            place = names.index(baseline)
            contrasts = np.delete(np.eye(len(names)), place, axis=0)
            contrasts[:, place] = -1
            others = [name for name in names if name != baseline]
            result = intervals(scores, contrasts, noise, families)
            yield _comparison(baseline, others, result, noise)


def _comparison(kind: str, names: Sequence[str], result: Intervals, noise: Noise) -> Comparison:
    parts = (result.estimates, result.half_width, result.simultaneous)
    found = {name: Difference(*(float(part[i]) for part in parts)) for i, name in enumerate(names)}
    largest = noise.range()
    return Comparison(kind, found, (float(np.median(largest)), float(np.quantile(largest, 0.95))))
