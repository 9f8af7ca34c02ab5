"""Short runs for the tests of the trainer, and what is compared of two of them."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from affkd_kernels.trainer.config import (
    DataConfig,
    OptimizerConfig,
    TeacherConfig,
    TermConfig,
    TrainConfig,
)
from affkd_kernels.trainer.run_folder import load_checkpoint

TERM = TermConfig(affinity="cosine", normalization="frobenius", options={"reduction": "matrixmean"})


def ignore(record):
    """Observe nothing."""


def small(out, **changes):
    """One epoch of four steps on a part of the digits, in a second or less."""
    config = TrainConfig(
        out=str(out),
        data=DataConfig("digits", limit=200),
        optimizer=OptimizerConfig(epochs=1),
        teacher=TeacherConfig(epochs=1),
        loss=TERM,
        threads=1,
        log_every=1,
    )
    return replace(config, **changes)


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "cost")}
    return value


def records(folder):
    """What a run recorded, times apart."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def total_losses(folder):
    return [record["total"] for record in records(folder) if record["kind"] == "train"]


def same_to_the_bit(first, second):
    """Compare the summaries, metrics and last checkpoints of two run folders, times apart."""
    summaries = [json.loads((path / "summary.json").read_text()) for path in (first, second)]
    assert without_times(summaries[0]) == without_times(summaries[1])
    assert records(first) == records(second)
    states = [load_checkpoint(path / "last.pt") for path in (first, second)]
    for part in ("weights", "order"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, value in states[0][part].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][part][name])), name
