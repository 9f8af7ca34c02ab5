"""The demo's table says what the results say, and says where they are incomplete."""

from __future__ import annotations

import pytest

from affkd_kernels.trainer.report import (
    Column,
    Result,
    append_result,
    markdown_table,
    plot,
    read_results,
    rows,
)

COLUMNS = (Column("all", "accuracy", "head"), Column("none", "neighbor_accuracy", "5-NN"))
RESULTS = [
    Result("all", "CE", 0, 90.0, 91.0, 1.0, None),
    Result("all", "CE", 1, 92.0, 91.0, 1.0, None),
    Result("all", "SP", 0, 80.0, 70.0, 1.0, 0.25),
    Result("none", "SP", 0, None, 60.0, 1.0, 0.25),
    Result("none", "SP", 1, None, 64.0, 1.0, 0.35),
]


def test_cells_are_means_and_sample_deviations_and_tell_missing_seeds():
    assert rows(RESULTS, COLUMNS, seeds=2) == [
        ["CE", "91.0±1.4", "-", "-"],
        ["SP", "80.0±0.0 (1 of 2)", "62.0±2.8", "0.25"],
    ]


def test_markdown_has_a_line_for_every_method():
    lines = markdown_table(RESULTS, COLUMNS, seeds=2).splitlines()
    assert lines[0] == "| student | all: head | none: 5-NN | loss, ms |"
    assert len(lines) == 4 and lines[2].startswith("| CE | 91.0")


def test_results_survive_the_file(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    for result in RESULTS:
        append_result(path, result)
    assert read_results(path) == RESULTS


@pytest.mark.parametrize("count", [1, 5])
def test_plot_draws_a_partial_comparison_too(tmp_path, count):
    plot(RESULTS[:count], COLUMNS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
