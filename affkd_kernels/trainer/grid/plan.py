"""Every run of a study: its place in the folder and its whole configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Literal

from affkd_kernels.trainer.config import SupervisionConfig, TermConfig, TrainConfig
from affkd_kernels.trainer.grid.config import GridConfig, PairConfig, SettingConfig
from affkd_kernels.trainer.objective import build_term
from affkd_kernels.trainer.run import teacher_run

Stage = Literal["selection", "final"]
RELATION = "relation"
# the reduction with which a triple does not vanish as the batch grows
REDUCTIONS = {
    "frobenius": "matrixmean",
    "row_l2": "batchmean",
    "row_l1": "batchmean",
    "row_sum": "batchmean",
    "softmax": "batchmean",
}


@dataclass(frozen=True)
class Method:
    """What a student is trained with besides labels."""

    name: str
    terms: dict[str, TermConfig] = field(default_factory=dict)
    kd: bool = False
    triple: tuple[str, str, str] | None = None


BASELINES = (Method("CE"), Method("KD", kd=True))


@dataclass(frozen=True)
class Case:
    """Everything that a method is compared within."""

    pair: PairConfig
    setting: str
    batch_size: int


@dataclass(frozen=True)
class Cell:
    """One run: a method in a case, at a level of its weight, with a seed."""

    stage: Stage
    case: Case
    method: Method
    level: float | None
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        return str(Path(self.config.out))


class Plan:
    """The cross product, and where each of its runs lies."""

    def __init__(self, config: GridConfig) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.skipped: dict[str, str] = {}
        self.methods = [*BASELINES, *self._triples(), *self._named()]
        slugs = [_slug(method.name) for method in self.methods]
        twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
        if twice:
            raise ValueError(f"two methods of the grid have one name: {', '.join(twice)}")

    def _triples(self) -> Iterator[Method]:
        config = self.config
        for triple in product(config.affinities, config.normalizations, config.losses):
            affinity, normalization, loss = triple
            reduction = REDUCTIONS.get(normalization.split("(")[0], "mean")
            options = {"reduction": reduction}
            term = TermConfig(None, affinity, normalization, loss, options=options)
            name = " / ".join(triple)
            try:
                build_term(name, term)
            except ValueError as error:
                self.skipped[name] = str(error)
                continue
            yield Method(name, {RELATION: term}, triple=triple)

    def _named(self) -> Iterator[Method]:
        for name, terms in self.config.methods.items():
            for term_name, term in terms.items():
                build_term(f"{name}.{term_name}", term)
            yield Method(name, dict(terms))

    def cases(self) -> list[Case]:
        base = self.config.base
        pairs = self.config.pairs or [PairConfig(base.teacher.model, base.student)]
        sizes = self.config.batch_sizes or [base.data.batch_size]
        return [Case(*case) for case in product(pairs, self.config.settings, sizes)]

    def possible(self, case: Case, method: Method) -> bool:
        """Without labels cross-entropy alone has nothing to learn from, nor has KD a judge."""
        if self.setting(case).labels_per_class != 0:
            return True
        return bool(method.terms or method.kd)

    def setting(self, case: Case) -> SettingConfig:
        return self.config.settings[case.setting]

    def teacher(self, pair: PairConfig, stage: Stage) -> TrainConfig:
        """The run of the teacher that all students of a pair share in a stage."""
        base = self._data_of(stage)
        model = replace(base.teacher, model=pair.teacher, checkpoint=None)
        out = self.folder / "teachers" / f"{_slug(pair.teacher)}-{stage}"
        return teacher_run(replace(base, teacher=model), out)

    def _data_of(self, stage: Stage) -> TrainConfig:
        held = self.config.validation if stage == "selection" else 0.0
        base = self.config.base
        return replace(base, data=replace(base.data, validation=held))

    def cell(
        self,
        stage: Stage,
        case: Case,
        method: Method,
        level: float | None,
        weights: dict[str, float],
        seed: int,
    ) -> Cell:
        """One run, with the weights of the method's terms by name."""
        base, labels = self._data_of(stage), self.setting(case).labels_per_class
        data = replace(base.data, batch_size=case.batch_size, labels_per_class=labels)
        checkpoint = Path(self.teacher(case.pair, stage).out) / "last.pt"
        terms = {name: replace(t, weight=weights[name]) for name, t in method.terms.items()}
        config = replace(
            base,
            out=str(self._place(stage, case, method, level, seed)),
            student=case.pair.student,
            seed=seed,
            data=data,
            teacher=replace(base.teacher, model=case.pair.teacher, checkpoint=str(checkpoint)),
            supervision=_supervision(base, method, labels),
            loss=TermConfig(),
            terms=terms,
        )
        return Cell(stage, case, method, level, seed, config)

    def _place(
        self, stage: Stage, case: Case, method: Method, level: float | None, seed: int
    ) -> Path:
        pair = f"{_slug(case.pair.teacher)}-{_slug(case.pair.student)}"
        place = self.folder / stage / pair / _slug(case.setting) / f"batch{case.batch_size}"
        # the level of a final run is chosen, so its folder must not depend on it
        tried = f"-{level:g}" if stage == "selection" and level is not None else ""
        return place / _slug(method.name) / f"seed{seed}{tried}"


def _supervision(base: TrainConfig, method: Method, labels: int | None) -> SupervisionConfig:
    given = replace(base.supervision, kd=0.0)
    if labels == 0:
        given = replace(given, cross_entropy=0.0)
    if not method.kd:
        return given
    # the mixture that the public comparisons use
    return replace(given, cross_entropy=0.1 * given.cross_entropy, kd=0.9)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", name).strip("_")
