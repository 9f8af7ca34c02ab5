"""Runs that one process and several must train alike; torchrun of this file trains them all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from trainer_runs import ignore

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
from affkd_kernels.trainer.processes import end_group, start_group
from affkd_kernels.trainer.run import run
from affkd_kernels.trainer.run_folder import load_checkpoint

MATRIX = {"reduction": "matrixmean"}


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


def prepare(folder):
    """The data, the teacher of all cases, and every case as one process trains it."""
    write_tiny_cifar(folder / "data", train=61, test=40)
    with plain_registered():
        teacher = replace(cases(folder)["cross entropy"], out=str(folder / "teacher"), seed=1)
        run(teacher, observe=ignore)
        train_all(folder, "1")


@contextmanager
def plain_registered():
    MODELS["plain"] = plain
    try:
        yield
    finally:
        del MODELS["plain"]


def train_all(folder, name):
    for case, config in cases(folder).items():
        run(replace(config, out=str(folder / name / case)), observe=ignore)


def torchrun(count, *arguments):
    """A command line in ``count`` processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launcher = [*("-m", "torch.distributed.run", "--nproc-per-node", str(count))]
    command = [sys.executable, *launcher, "--master-port", str(port), *map(str, arguments)]
    # they import what this process does
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def train_in(folder, count):
    """Every case by ``count`` processes, beside those that ``prepare`` left."""
    finished = torchrun(count, __file__, folder)
    if finished.returncode:
        raise RuntimeError(finished.stderr)


def deviation(folder, case, count):
    """How far ``count`` processes are from one: largest relative difference by what differs.

    ``metrics`` are the terms of every step and every score of the evaluations, each compared with
    itself; ``weights`` are those at the end, compared with the largest of their tensor.
    """
    ours, alone = (folder / name / case for name in (str(count), "1"))
    pairs = list(zip(_figures(ours), _figures(alone), strict=True))
    assert [name for (name, _), _ in pairs] == [name for _, (name, _) in pairs]
    states = [load_checkpoint(path / "last.pt")["weights"] for path in (ours, alone)]
    return {
        "metrics": max(abs(one - other) / abs(other) for (_, one), (_, other) in pairs if other),
        "weights": max(
            ((states[0][name] - value).abs().max() / value.abs().max()).item()
            for name, value in states[1].items()
        ),
    }


def _figures(folder):
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        values = record["terms"] if record["kind"] == "train" else record
        for name, value in values.items():
            if name not in ("kind", "epoch", "step", "seconds"):
                yield f"{record['kind']} {record['step']} {name}", value


def gloo_threads():
    """Names of this process's threads that work for a group of processes."""
    tasks = Path("/proc/self/task").glob("*/comm")
    return [name for name in (path.read_text().strip() for path in tasks) if "gloo" in name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_group("gloo")
    with plain_registered():
        train_all(Path(sys.argv[1]), str(dist.get_world_size()))
    end_group()
    # one that outlived its group could end the process by SIGABRT, with everything done
    assert not gloo_threads(), gloo_threads()
