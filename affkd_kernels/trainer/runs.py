"""``affkd report``: all finished runs below a folder in one table, beside the published figures."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from affkd_kernels.trainer.config import TermConfig, TrainConfig
from affkd_kernels.trainer.published import published_accuracy
from affkd_kernels.trainer.report import spread
from affkd_kernels.trainer.run_folder import RunFolder

NOTE = """
Test accuracy in percent, mean±standard deviation over the seeds; "best" is the best epoch by the
test images, so it flatters. "published" is the last epoch of RepDistiller's README, for real
CIFAR-100 and 240 epochs; "difference" means something for such runs alone. "relation" is the
relational terms' part of the time of a step.
"""
TITLES = {
    "data": "data",
    "teacher": "teacher",
    "student": "student",
    "method": "method",
    "epochs": "epochs",
    "seeds": "seeds",
    "last": "last epoch",
    "best": "best epoch",
    "published": "published",
    "difference": "difference",
    "step": "step, ms",
    "relation": "relation",
}


@dataclass(frozen=True)
class Line:
    """The runs that differ in their seed alone."""

    data: str
    teacher: str
    student: str
    method: str
    epochs: int
    seeds: int
    last: str
    best: str
    published: str
    difference: str
    step: str
    relation: str


def report_runs(folder: Path) -> str:
    """The table as Markdown, also in ``runs.md`` and ``runs.csv`` of the folder.

    Raises:
        ValueError: no run below the folder is finished.
    """
    groups: dict[tuple[str, ...], list[tuple[TrainConfig, dict[str, Any]]]] = {}
    for config, summary in finished_runs(folder):
        groups.setdefault(_same(config), []).append((config, summary))
    if not groups:
        raise ValueError(f"{folder} holds no finished run: no summary.json is below it")
    lines = [_line(runs) for _, runs in sorted(groups.items())]
    text = markdown(lines) + NOTE
    (folder / "runs.md").write_text(text)
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Line)])
        writer.writeheader()
        writer.writerows(map(asdict, lines))
    return text


def finished_runs(folder: Path) -> Iterator[tuple[TrainConfig, dict[str, Any]]]:
    """Configuration and summary of every run that has ended."""
    for path in sorted(folder.rglob("summary.json")):
        run = RunFolder(path.parent)
        summary = run.summary()
        if summary is not None:
            yield run.config(), summary


def _same(config: TrainConfig) -> tuple[str, ...]:
    labels = config.data.labels_per_class
    data = config.data.name if labels is None else f"{config.data.name}, {labels} labels a class"
    teacher = config.teacher.model if config.needs_teacher() else "-"
    epochs = str(config.optimizer.epochs)
    return data, teacher, config.student, method_name(config), epochs


def method_name(config: TrainConfig) -> str:
    """What a run trains with, as in ``CE + sp(weight=3000)``."""
    supervision, parts = config.supervision, []
    if supervision.cross_entropy and config.data.labels_per_class != 0:
        factor = supervision.cross_entropy
        parts.append("CE" if factor == 1 else f"{factor:g} CE")
    if supervision.kd:
        parts.append(f"{supervision.kd:g} KD")
    parts += [_term_name(term) for term in config.asked_terms().values()]
    return " + ".join(parts)


def _term_name(term: TermConfig) -> str:
    given = (term.affinity, term.normalization, term.loss)
    name = term.preset or "/".join(part for part in given if part)
    return name if term.weight is None else f"{term.weight:g} {name}"


def _line(runs: Sequence[tuple[TrainConfig, dict[str, Any]]]) -> Line:
    config = runs[0][0]
    summaries = [summary for _, summary in runs]
    last = [summary["last"]["test_accuracy"] for summary in summaries]
    best = [summary["best"]["test_accuracy"] for summary in summaries]
    published = published_accuracy(config.to_dict())
    step = [s["cost"]["step_milliseconds"] for s in summaries]
    relation = [s["cost"]["relation_milliseconds"] for s in summaries]
    known = [(r, s) for r, s in zip(relation, step, strict=True) if r is not None and s is not None]
    steps = [time for time in step if time is not None]
    data, teacher, student, method, epochs = _same(config)
    return Line(
        *(data, teacher, student, method, int(epochs), len(runs)),
        last=_mean(last),
        best=_mean(best),
        published="-" if published is None else f"{published:.2f}",
        difference="-" if published is None else f"{statistics.fmean(last) - published:+.2f}",
        step=f"{statistics.median(steps):.1f}" if steps else "-",
        relation=f"{100 * statistics.median(r / s for r, s in known):.1f} %" if known else "-",
    )


def _mean(values: Sequence[float]) -> str:
    mean, deviation = spread(values)
    return f"{mean:.2f}±{deviation:.2f}" if len(values) > 1 else f"{mean:.2f}"


def markdown(lines: Sequence[Line]) -> str:
    """The lines as a Markdown table."""
    rows = [list(TITLES.values()), ["---"] * len(TITLES)]
    rows += [[str(getattr(line, name)) for name in TITLES] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
