"""The scores of a finished study, read from the files that ``affkd grid`` wrote."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from affkd_kernels.trainer.config import TermConfig, TrainConfig
from affkd_kernels.trainer.errors import FileContentError, reading
from affkd_kernels.trainer.grid.config import GridConfig, PairConfig, SettingConfig
from affkd_kernels.trainer.grid.plan import Case, Method, Plan
from affkd_kernels.trainer.grid.run import KEYS, SCORES, TIMES
from affkd_kernels.trainer.published import published_accuracy
from affkd_kernels.trainer.run import import_modules

Scores = NDArray[np.float64]
Line = dict[str, str]


@dataclass
class MethodResult:
    """The final runs of a method in one case: figures by seed, in percent and milliseconds.

    ``relation`` is the relational terms' part of the time of a step.
    """

    name: str
    triple: tuple[str, str, str] | None = None
    level: float | None = None
    published: float | None = None
    last: dict[int, float] = field(default_factory=dict)
    best: dict[int, float] = field(default_factory=dict)
    best_epoch: dict[int, int] = field(default_factory=dict)
    step: dict[int, float] = field(default_factory=dict)
    relation: dict[int, float] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


@dataclass
class CaseResult:
    """Everything that is compared with each other."""

    case: Case
    score: str
    seeds: list[int]
    methods: dict[str, MethodResult]

    @property
    def title(self) -> str:
        pair = self.case.pair
        return (
            f"{pair.teacher} to {pair.student}, {self.case.setting}, batch {self.case.batch_size}"
        )

    def complete(self) -> list[MethodResult]:
        """The methods with a score for every seed: those that can be compared in pairs."""
        return [m for m in self.methods.values() if all(seed in m.last for seed in self.seeds)]

    def scores(self, methods: Sequence[MethodResult]) -> Scores:
        """Last-epoch scores of complete methods, [seeds, methods]."""
        return np.array([[method.last[seed] for method in methods] for seed in self.seeds])


@dataclass
class StudyResult:
    """A study: its plan and what came of it."""

    plan: Plan
    cases: list[CaseResult]


def read_study(folder: Path) -> StudyResult:
    """Read ``grid.yaml``, ``results.csv`` and ``times.csv`` of a study.

    Raises:
        ValueError: the study is not finished.
        FileContentError: one of the files is damaged.
    """
    plan = Plan(_grid_config(folder / "grid.yaml"))
    if not (folder / "results.csv").exists():
        raise ValueError(
            f"{folder} holds a study that is not finished: it has no results.csv; "
            "continue it with affkd grid and the same configuration"
        )
    scores = _lines(folder / "results.csv", KEYS + SCORES)
    times = {_key(line): line for line in _lines(folder / "times.csv", KEYS + TIMES)}
    cases = [_case_result(plan, case) for case in plan.cases()]
    found = {_case_key(result.case): result for result in cases}
    with reading(folder / "results.csv", "the results of the study in grid.yaml"):
        for line in scores:
            if line["stage"] == "final":
                key = tuple(line[name] for name in ("teacher", "student", "setting", "batch_size"))
                method = found[key].methods[line["method"]]
                _enter(method, {**line, **times.get(_key(line), {})})
    return StudyResult(plan, cases)


def _grid_config(path: Path) -> GridConfig:
    with reading(path, "the configuration of a study"):
        values = yaml.safe_load(path.read_text())
        terms = values["methods"].items()
        built: dict[str, Any] = {
            "base": TrainConfig.from_dict(values["base"]),
            "pairs": [PairConfig(**pair) for pair in values["pairs"]],
            "settings": {k: SettingConfig(**v) for k, v in values["settings"].items()},
            "methods": {k: {n: TermConfig(**t) for n, t in v.items()} for k, v in terms},
        }
        config = GridConfig(**{**values, **built})
    import_modules(config.base.imports)
    return config


def _lines(path: Path, columns: Sequence[str]) -> list[Line]:
    with reading(path, "a table of affkd grid"), path.open(newline="") as file:
        lines = list(csv.DictReader(file))
        missing = [name for name in columns if lines and name not in lines[0]]
        if missing or not lines:
            raise FileContentError(
                path, f"not a table of affkd grid (it has no {missing or 'row'})"
            )
    return lines


def _key(line: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(line[name] for name in KEYS)


def _case_key(case: Case) -> tuple[str, ...]:
    return case.pair.teacher, case.pair.student, case.setting, str(case.batch_size)


def _case_result(plan: Plan, case: Case) -> CaseResult:
    methods = [method for method in plan.methods if plan.possible(case, method)]
    return CaseResult(
        case,
        plan.setting(case).score,
        plan.config.seeds,
        {m.name: MethodResult(m.name, m.triple, None, _published(plan, case, m)) for m in methods},
    )


def _published(plan: Plan, case: Case, method: Method) -> float | None:
    if plan.setting(case).labels_per_class is not None:
        # the published runs had all labels
        return None
    weights = dict.fromkeys(method.terms, 1.0)
    config = plan.cell("final", case, method, None, weights, plan.config.seeds[0]).config
    return published_accuracy(config.to_dict())


def _enter(method: MethodResult, line: Line) -> None:
    """Put the figures of one run where they belong; an empty one is none."""
    seed = int(line["seed"])
    method.level = float(line["level"]) if line["level"] else None
    if line["failure"]:
        method.failures[seed] = line["failure"]
    for figures, name in (
        (method.last, "last"),
        (method.best, "best"),
        (method.step, "step_milliseconds"),
    ):
        if line.get(name):
            figures[seed] = json.loads(line[name])
    if line["best_epoch"]:
        method.best_epoch[seed] = int(line["best_epoch"])
    if line.get("relation_milliseconds") and method.step.get(seed):
        method.relation[seed] = float(line["relation_milliseconds"]) / method.step[seed]
