"""One run in several processes: the weights of one process, one writer, an end for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trainer_cases
from trainer_cases import cases, deviation, torchrun

# float32, a batch summed up in another order in each of six steps; the divergence of KD is a small
# difference of logarithms, and so is its relative error the largest
WITHIN = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every case trained by one process."""
    folder = tmp_path_factory.mktemp("processes")
    trainer_cases.prepare(folder)
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def count(folder, request):
    """The number of processes that have trained every case too."""
    trainer_cases.train_in(folder, request.param)
    return request.param


@pytest.mark.parametrize("name", cases(Path()))
def test_several_processes_train_as_one(folder, count, name):
    found = deviation(folder, name, count)
    assert found.keys() == {"metrics", "weights"} and max(found.values()) <= WITHIN, found


def launch(*arguments):
    return torchrun(2, "-m", "affkd_kernels.trainer.cli", *arguments)


def test_torchrun_trains_teacher_and_student_and_tells_it_once(tmp_path):
    """With batch normalization, as everybody's networks have it."""
    arguments = ["train", "--data.name", "digits", "--data.limit", "150", "--threads", "1",
                 "--optimizer.epochs", "1", "--teacher.epochs", "1", "--loss.preset", "cka",
                 "--out", str(tmp_path / "run")]  # fmt: skip
    first = launch(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("accuracy") == 3 and first.stdout.count("gradient shares") == 1
    assert (tmp_path / "run/teacher/summary.json").exists()
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 3
    # both processes end where the main one cannot begin
    again = launch(*arguments)
    assert again.returncode != 0 and "is not empty" in again.stderr
