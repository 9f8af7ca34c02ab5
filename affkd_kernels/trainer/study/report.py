"""``affkd report`` over a study: one page, its tables as CSV and LaTeX, its pictures as PNG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from affkd_kernels.trainer.run_folder import write_atomically, write_text
from affkd_kernels.trainer.study.analysis import Analysis, CaseAnalysis, analyze
from affkd_kernels.trainer.study.plots import effects_plot, heat_map
from affkd_kernels.trainer.study.results import StudyResult, read_study
from affkd_kernels.trainer.study.summary import METHOD, level_name, of_case, overall
from affkd_kernels.trainer.study.table import Table, csv_text
from affkd_kernels.trainer.study.tables import (
    effect_rows,
    effects_table,
    method_rows,
    methods_table,
)


def is_study(folder: Path) -> bool:
    """Whether ``affkd grid`` works in this folder."""
    return (folder / "grid.yaml").is_file()


def report_study(folder: Path, console: Console | None = None) -> Path:
    """Analyze a finished study into ``report/`` of its folder.

    Writes ``report.md``, ``methods.csv``, ``effects.csv``, ``tables.tex`` and, where matplotlib is,
    two pictures of each case. The same results give the same page and tables, to the byte.

    Args:
        folder: of the study.
        console: shows the sentences and the tables too; 140 columns take them whole.

    Returns:
        ``report.md``.

    Raises:
        ValueError: the study is not finished.
        FileContentError: a file of the study is damaged.
    """
    study = read_study(folder)
    analysis = analyze(study)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    pictures = [_pictures(case, out) for case in analysis.cases]
    tables = [_tables(case, study) for case in analysis.cases]
    _write(out / "report.md", _page(study, analysis, pictures, tables))
    _write(out / "tables.tex", "\n".join(t.latex() for case in tables for t in case))
    _write(out / "methods.csv", csv_text([r for c in analysis.cases for r in method_rows(c)]))
    _write(out / "effects.csv", csv_text([r for c in analysis.cases for r in effect_rows(c)]))
    if console is not None:
        _show(study, analysis, tables, console)
    return out / "report.md"


def _pictures(case: CaseAnalysis, out: Path) -> list[Path]:
    """The pictures that this case has something for; none without matplotlib."""
    wanted: list[tuple[str, Sequence[object], Callable[[CaseAnalysis, Path], None]]] = [
        ("heat", case.triples, heat_map),
        ("effects", case.effects, effects_plot),
    ]
    slug = re.sub(r"\W+", "-", case.result.title)
    drawn = []
    for name, content, draw in wanted:
        path = out / f"{name}-{slug}.png"
        try:
            if content:
                draw(case, path)
                drawn.append(path)
        except ModuleNotFoundError:
            # the tables say all of it
            return []
    return drawn


def _tables(case: CaseAnalysis, study: StudyResult) -> list[Table]:
    methods = methods_table(case, level_name(study.plan.config))
    return [methods, *([effects_table(case)] if case.effects else [])]


def _page(
    study: StudyResult,
    analysis: Analysis,
    pictures: Sequence[Sequence[Path]],
    tables: Sequence[Sequence[Table]],
) -> str:
    parts = ["# What the study shows\n", *(f"{text}\n" for text in _opening(study, analysis))]
    for case, drawn, shown in zip(analysis.cases, pictures, tables, strict=True):
        parts.append(f"## {case.result.title}\n")
        parts.append("".join(f"- {text}\n" for text in of_case(case, study.plan.config)))
        parts += [f"![{path.stem}]({path.name})\n" for path in drawn]
        parts += [f"### {table.title.split(':')[0]}\n\n{table.markdown()}" for table in shown]
    return "\n".join([*parts, "## How to read this", METHOD])


def _opening(study: StudyResult, analysis: Analysis) -> Iterator[str]:
    config, plan = study.plan.config, study.plan
    triples = sum(method.triple is not None for method in plan.methods)
    yield (
        f"{triples} valid triples ({len(plan.skipped)} combinations are not valid), "
        f"{len(plan.methods) - triples} other methods, {len(config.seeds)} seeds, "
        f"{config.base.optimizer.epochs} epochs on {config.base.data.name}. Each method's "
        f"{level_name(config)} is of {', '.join(f'{level:g}' for level in config.levels)}."
    )
    yield from overall(analysis)


def _show(
    study: StudyResult,
    analysis: Analysis,
    tables: Sequence[Sequence[Table]],
    console: Console,
) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for text in _opening(study, analysis):
        say(text)
    for case, shown in zip(analysis.cases, tables, strict=True):
        console.rule(case.result.title, align="left")
        for text in of_case(case, study.plan.config):
            say(f"- {text}")
        for table in shown:
            console.print(table.rich())


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: write_text(partial, text))
