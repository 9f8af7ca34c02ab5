"""One run in two processes: the weights of one process, one writer, an end for both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from affkd_kernels.trainer.config import (
    DataConfig,
    OptimizerConfig,
    SupervisionConfig,
    TeacherConfig,
    TermConfig,
    TrainConfig,
)
from affkd_kernels.trainer.data.tiny import write_tiny_cifar
from affkd_kernels.trainer.models import MODELS, Classifier
from affkd_kernels.trainer.run import run
from affkd_kernels.trainer.run_folder import load_checkpoint

MATRIX = {"reduction": "matrixmean"}


def ignore(record):
    """Observe nothing."""


def plain(channels, classes):
    """Without batch normalization, whose statistics are those of each process's images."""
    features = nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64 * channels, 32), nn.Tanh(), nn.Linear(32, 16)
    )
    return Classifier(features, nn.Sequential(nn.Tanh(), nn.Linear(16, classes)))


def cases(folder):
    """Runs by name, all of batches of 24 and a last one of 13."""
    data = DataConfig(
        *("cifar100", 24), root=str(folder / "data"), verify=False, crop_padding=4, flip=True
    )
    teacher = TeacherConfig("plain", checkpoint=str(folder / "teacher/last.pt"))
    base = TrainConfig(
        out="",
        student="plain",
        data=data,
        optimizer=OptimizerConfig("sgd", lr=0.05, epochs=2),
        teacher=teacher,
        threads=1,
        log_every=1,
    )
    rkd = {
        "distance": TermConfig("rkd_distance", weight=25.0),
        "angle": TermConfig("rkd_angle", weight=50.0),
    }
    few = replace(data, labels_per_class=1, labeled_batch=5)
    return {
        "cross entropy": base,
        "kd": replace(base, supervision=SupervisionConfig(0.1, 0.9)),
        "sp": replace(base, loss=TermConfig("sp", weight=300.0)),
        "rkd in parts": replace(base, terms=rkd, accumulate=2),
        "cka, few labels": replace(base, data=few, loss=TermConfig("cka")),
        # a head that nothing trains decays in several processes and stays as it is in one
        "triple, no labels": replace(
            base,
            data=replace(data, labels_per_class=0),
            optimizer=OptimizerConfig("sgd", lr=0.05, epochs=2, weight_decay=0.0),
            loss=TermConfig(None, "rbf(gamma=0.4)", "frobenius", "l1", options=MATRIX),
        ),
    }


def worker(rank, folder, port):
    environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    MODELS["plain"] = plain
    dist.init_process_group("gloo")
    for name, config in cases(folder).items():
        run(replace(config, out=str(folder / "two" / name)), observe=ignore)
    dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder with every case trained by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    write_tiny_cifar(folder / "data", train=61, test=40)
    MODELS["plain"] = plain
    try:
        alone = cases(folder)
        teacher = replace(alone["cross entropy"], out=str(folder / "teacher"), seed=1)
        run(teacher, observe=ignore)
        for name, config in alone.items():
            run(replace(config, out=str(folder / "one" / name)), observe=ignore)
    finally:
        del MODELS["plain"]
    torch.multiprocessing.spawn(worker, (folder, free_port()), nprocs=2)
    return folder


def terms(run_folder):
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [record["terms"] for record in lines if record["kind"] == "train"]


@pytest.mark.parametrize("name", cases(Path()))
def test_two_processes_train_as_one(both, name):
    found, expected = (terms(both / count / name) for count in ("two", "one"))
    assert len(found) == len(expected) == 6
    for ours, alone in zip(found, expected, strict=True):
        assert ours == pytest.approx(alone, rel=1e-4)
    weights = [
        load_checkpoint(both / count / name / "last.pt")["weights"] for count in ("two", "one")
    ]
    for path, value in weights[1].items():
        torch.testing.assert_close(weights[0][path], value, rtol=1e-3, atol=1e-5)


def launch(*arguments):
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [sys.executable, "-m", *launcher, "-m", "affkd_kernels.trainer.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


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
