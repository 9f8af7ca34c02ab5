"""The published figures of the standard CIFAR-100 comparison, and which run they belong beside."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

# the method of a run by the presets of its relational terms
_METHODS: dict[frozenset[str], str] = {
    frozenset(): "student",
    frozenset({"sp"}): "sp",
    frozenset({"pkt"}): "pkt",
    frozenset({"rkd_distance", "rkd_angle"}): "rkd",
    frozenset({"nst"}): "nst",
}


@cache
def published_table() -> Mapping[tuple[str, str], Mapping[str, float]]:
    """Top-1 in percent by (teacher, student), then by method; the file names its source."""
    text = (resources.files("affkd_kernels.trainer") / "published.csv").read_text()
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {
        (row.pop("teacher_model"), row.pop("student_model")): {k: float(v) for k, v in row.items()}
        for row in rows
    }


def published_method(config: Mapping[str, Any]) -> str | None:
    """The column of the table that a run's configuration is of, None where it is of none."""
    terms = [config["loss"], *config["terms"].values()]
    asked = [term for term in terms if term["preset"] or term["affinity"]]
    presets = frozenset(term["preset"] for term in asked)
    method = _METHODS.get(presets) if len(presets) == len(asked) else None
    if not config["supervision"]["kd"]:
        return method
    return "kd" if method == "student" else None


def published_accuracy(config: Mapping[str, Any]) -> float | None:
    """The published figure for a run of this configuration, None where there is none.

    A run whose student is its own teacher's network is a teacher's. The figure is of real CIFAR-100
    and 240 epochs; whether the run is too is for the reader to see.
    """
    if config["data"]["name"] != "cifar100":
        return None
    teacher, student = config["teacher"]["model"], config["student"]
    if teacher == student:
        figures = [
            row["teacher"] for (model, _), row in published_table().items() if model == teacher
        ]
        return figures[0] if figures else None
    return published_table().get((teacher, student), {}).get(published_method(config) or "")
