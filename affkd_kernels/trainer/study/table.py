"""One table, for Markdown, LaTeX and a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import rich.table
from rich.box import SIMPLE_HEAD

_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: rf"\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


@dataclass(frozen=True)
class Table:
    """Text cells below headings; the first ``left`` columns hold names, the others figures."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    left: int = 1

    def markdown(self) -> str:
        rule = ["---" if i < self.left else "---:" for i in range(len(self.headings))]
        lines = [self.headings, rule, *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def latex(self) -> str:
        """A ``table`` that needs the package booktabs."""
        columns = "l" * self.left + "r" * (len(self.headings) - self.left)
        head, *rows = (
            " & ".join(latex_text(cell) for cell in line) + r" \\"
            for line in (self.headings, *self.rows)
        )
        lines = [
            r"\begin{table}\centering",
            rf"\caption{{{latex_text(self.title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            *(r"\toprule", head, r"\midrule", *rows, r"\bottomrule"),
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=0)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if index < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


def latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of one set of columns; None is an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
