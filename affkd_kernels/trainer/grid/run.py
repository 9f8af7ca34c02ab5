"""``affkd grid``: teachers once, weights chosen on validation images, then the runs that count."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from affkd_kernels.trainer.balance import balanced_terms
from affkd_kernels.trainer.errors import FileContentError, reading
from affkd_kernels.trainer.grid.config import GridConfig
from affkd_kernels.trainer.grid.plan import Case, Cell, Method, Plan, Stage
from affkd_kernels.trainer.grid.work import launch, shared_data, shared_teacher, train_all
from affkd_kernels.trainer.run import run
from affkd_kernels.trainer.run_folder import RunFolder, differences, write_atomically, write_text

Row = dict[str, Any]
KEYS = (
    *("stage", "teacher", "student", "setting", "batch_size", "method"),
    *("affinity", "normalization", "loss", "level", "seed"),
)
SCORES = ("score", "last", "best", "best_epoch", "failure")
TIMES = ("seconds", "step_milliseconds", "relation_milliseconds", "peak_memory_mib")
# what may differ when a study is continued
INCIDENTAL = ("out", "jobs", "launcher")


class Grid:
    """A study in its folder. What is finished there is never done again."""

    def __init__(self, config: GridConfig, tell: Callable[[str], None] = print) -> None:
        self.config = config
        self.plan = Plan(config)
        self.folder = Path(config.out)
        self.tell = tell
        self.failures: dict[str, str] = {}
        self.unmeasured: dict[str, str] = {}
        self._units: dict[str, dict[str, float]] = {}
        self._teachers: set[str] = set()

    def run(self) -> list[Row]:
        """Train everything that is not finished; a row for each run, also in ``results.csv``.

        Raises:
            ValueError: the folder holds another study.
            RuntimeError: a teacher could not be trained by the launcher.
        """
        self._open()
        self._tell_skipped()
        selects = len(self.config.levels) > 1
        selection = list(self._cells("selection", self._every_level)) if selects else []
        self._train(selection)
        chosen = self._choose(selection)
        final = list(self._cells("final", chosen))
        self._train(final)
        rows = [self._row(cell) for cell in (*selection, *final)]
        self._write_tables(rows)
        return rows

    def _open(self) -> None:
        path, given = self.folder / "grid.yaml", json.loads(json.dumps(self.config.to_dict()))
        if path.exists():
            with reading(path, "the configuration of a study"):
                stored = yaml.safe_load(path.read_text())
            if not isinstance(stored, dict):
                raise FileContentError(path, "not the configuration of a study")
            changed = differences(_essential(stored), _essential(given))
            if changed:
                raise ValueError(f"{self.folder} holds another study: {'; '.join(changed)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(given, sort_keys=False)
        write_atomically(path, lambda partial: write_text(partial, text))

    def _tell_skipped(self) -> None:
        """How many triples are valid; what is wrong with the others goes into ``skipped.csv``."""
        skipped, path = self.plan.skipped, self.folder / "skipped.csv"
        if not skipped:
            return
        rows = [{"triple": name, "reason": reason} for name, reason in skipped.items()]
        _write_csv(path, ("triple", "reason"), rows)
        valid = sum(method.triple is not None for method in self.plan.methods)
        everything = valid + len(skipped)
        self.tell(f"{valid} of {everything} triples are valid; {path} has the others, with reasons")

    def _every_level(self, case: Case, method: Method) -> list[float | None]:
        return [*self.config.levels] if method.terms else []

    def _cells(
        self, stage: Stage, levels: Callable[[Case, Method], list[float | None]]
    ) -> Iterator[Cell]:
        seeds = self.config.selection_seeds if stage == "selection" else self.config.seeds
        # seeds outermost: an interrupted study has whole tables of fewer seeds
        for seed in seeds:
            for case in self.plan.cases():
                for method in self.plan.methods:
                    if not self.plan.possible(case, method):
                        continue
                    for level in levels(case, method):
                        weights = self._weights(case, method, level)
                        if weights is not None:
                            yield self.plan.cell(stage, case, method, level, weights, seed)

    def _choose(self, selection: list[Cell]) -> Callable[[Case, Method], list[float | None]]:
        """The level of each method in each case: the best mean score on the validation images."""
        scores: dict[tuple[Case, str], dict[float, list[float]]] = {}
        for cell in selection:
            row = self._row(cell)
            if cell.level is not None and row["last"] is not None:
                levels = scores.setdefault((cell.case, cell.method.name), {})
                levels.setdefault(cell.level, []).append(row["last"])

        def choose(case: Case, method: Method) -> list[float | None]:
            if not method.terms:
                return [None]
            if len(self.config.levels) == 1:
                return [self.config.levels[0]]
            found = scores.get((case, method.name), {})
            # of equals the smaller; none where every level failed
            best = max(
                sorted(found), key=lambda level: statistics.fmean(found[level]), default=None
            )
            return [] if best is None else [best]

        return choose

    def _weights(self, case: Case, method: Method, level: float | None) -> dict[str, float] | None:
        """The weights of the terms by name; None where they cannot be measured."""
        if level is None:
            return {}
        if method.name in self.unmeasured:
            return None
        try:
            return {name: unit * level for name, unit in self._unit(case, method).items()}
        except ValueError as error:
            # as where a method has no gradient: it cannot be compared, the others can
            self.unmeasured[method.name] = str(error)
            self.tell(f"no weight for {method.name}: {error}")
            return None

    def _unit(self, case: Case, method: Method) -> dict[str, float]:
        """The weights of the terms at level 1, measured once and kept in ``weights.json``."""
        key = f"{case.pair.teacher} / {case.pair.student} / {case.batch_size} / {method.name}"
        path = self.folder / "weights.json"
        if not self._units and path.exists():
            with reading(path, "the weights of a study; delete it to measure them again"):
                self._units = json.loads(path.read_text())
        if key not in self._units:
            self._units[key] = self._measure(case, method)
            text = json.dumps(self._units, indent=2)
            write_atomically(path, lambda partial: write_text(partial, text))
        return self._units[key]

    def _measure(self, case: Case, method: Method) -> dict[str, float]:
        given = {name: 1.0 if t.weight is None else t.weight for name, t in method.terms.items()}
        if self.config.weights:
            return given
        self._train_teacher(case, "final")
        config = self.plan.cell("final", case, method, 1.0, given, self.config.seeds[0]).config
        terms = balanced_terms(method.terms, config, shared_data(config), shared_teacher(config))
        return {name: term.weight or 0.0 for name, term in terms.items()}

    def _train_teacher(self, case: Case, stage: Stage) -> None:
        teacher, launcher = self.plan.teacher(case.pair, stage), self.config.launcher
        if teacher.out in self._teachers:
            return
        if launcher is None:
            run(teacher, resume=True, observe=lambda record: None)
        else:
            failure = launch(teacher, launcher)
            if failure is not None:
                raise RuntimeError(f"the teacher {case.pair.teacher!r} was not trained: {failure}")
        self._teachers.add(teacher.out)

    def _train(self, cells: list[Cell]) -> None:
        for case, stage in dict.fromkeys((cell.case, cell.stage) for cell in cells):
            self._train_teacher(case, stage)
        configs = {cell.config.out: cell for cell in cells}
        asked = [cell.config for cell in cells]
        done = train_all(asked, self.config.jobs, self.config.launcher)
        for count, (config, failure) in enumerate(done, start=1):
            if failure is not None:
                self.failures[config.out] = failure
            told = failure or f"{self._row(configs[config.out])['last']:.2f}"
            self.tell(f"[{count}/{len(cells)}] {Path(config.out).relative_to(self.folder)}: {told}")

    def _row(self, cell: Cell) -> Row:
        triple = cell.method.triple or ("", "", "")
        score = self.plan.setting(cell.case).score
        case = cell.case
        row: Row = dict(
            zip(
                KEYS,
                (
                    *(cell.stage, case.pair.teacher, case.pair.student, case.setting),
                    *(case.batch_size, cell.method.name, *triple, cell.level, cell.seed),
                ),
                strict=True,
            )
        )
        failure = self.failures.get(cell.config.out)
        row |= {"score": score, "last": None, "best": None, "best_epoch": None, "failure": failure}
        summary = None if failure else RunFolder(Path(cell.config.out)).summary()
        if summary is not None:
            row["last"] = summary["last"][score]
            if score == "test_accuracy":
                row |= {"best": summary["best"][score], "best_epoch": summary["best"]["epoch"]}
            row |= {"seconds": summary["seconds"], **summary["cost"]}
        return row

    def _write_tables(self, rows: list[Row]) -> None:
        # times apart: the results of two runs of one study are the same file
        _write_csv(self.folder / "results.csv", KEYS + SCORES, rows)
        _write_csv(self.folder / "times.csv", KEYS + TIMES, rows)


def _essential(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in INCIDENTAL}


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda partial: write_text(partial, text.getvalue()))
