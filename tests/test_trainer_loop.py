"""The loop: repeatable to the bit, through a kill too, and loud about a loss that breaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from affkd_kernels.trainer.config import (
    DataConfig,
    OptimizerConfig,
    SupervisionConfig,
    TeacherConfig,
    TermConfig,
    TrainConfig,
)
from affkd_kernels.trainer.data import load_data
from affkd_kernels.trainer.loop import Run, build_objective, run
from affkd_kernels.trainer.models import MODELS
from affkd_kernels.trainer.objective import NonFiniteLossError, Objective, Outputs
from affkd_kernels.trainer.run_folder import RunFolder, load_checkpoint

TERM = TermConfig(affinity="cosine", normalization="frobenius", options={"reduction": "matrixmean"})


def ignore(record):
    """Observe nothing."""


def small(out, **changes):
    """One epoch on a part of the digits, in a second or less."""
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
        return {k: without_times(v) for k, v in value.items() if k != "seconds"}
    return value


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


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


def test_a_run_leaves_its_records_and_trains_its_teacher_first(tmp_path):
    seen = []
    summary = run(small(tmp_path / "run"), observe=seen.append)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "summary.json",
        "last.pt",
        "best.pt",
        "teacher",
    }
    assert (tmp_path / "run/teacher/summary.json").exists()
    assert summary["steps"] == 4 and summary["last"]["epoch"] == 1
    assert [bool(r.get("teacher")) for r in seen] == [True] * 5 + [False] * 5
    terms = records(tmp_path / "run")[0]["terms"]
    assert terms.keys() == {"cross_entropy", "relation"}


def test_the_same_seed_repeats_a_run_and_another_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(small(tmp_path / name, seed=seed), observe=ignore)
    same_to_the_bit(tmp_path / "a", tmp_path / "b")
    assert records(tmp_path / "a") != records(tmp_path / "c")


def test_learning_happens(tmp_path):
    config = small(
        tmp_path / "run",
        data=DataConfig("digits"),
        loss=TermConfig(),
        seed=3,
        optimizer=OptimizerConfig(epochs=4),
    )
    frozen = OptimizerConfig(epochs=1, lr=0.0)
    before = run(replace(config, out=str(tmp_path / "0"), optimizer=frozen), observe=ignore)
    after = run(config, observe=ignore)
    assert before["last"]["test_accuracy"] < 30
    assert after["last"]["test_accuracy"] > 60
    assert not (tmp_path / "run/teacher").exists()


def test_a_folder_is_not_written_over_and_a_finished_run_is_not_repeated(tmp_path):
    config = small(tmp_path / "run", loss=TermConfig())
    summary = run(config, observe=ignore)
    with pytest.raises(FileExistsError, match="--resume auto"):
        run(config, observe=ignore)
    seen = []
    assert run(config, resume=True, observe=seen.append) == summary
    assert seen == []


def dropout_student(channels, classes):
    """A student that draws random numbers at every step."""
    student = MODELS["cnn_student"](channels, classes)
    student.head.insert(0, torch.nn.Dropout(0.5))
    return student


@pytest.mark.parametrize("every", [0, 3, 4])
@pytest.mark.parametrize("stop", [("train", 1), ("evaluation", 4), ("train", 6), ("evaluation", 8)])
def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch, stop, every):
    """Interrupted by an exception after any record, in the middle of an epoch or at its end."""
    monkeypatch.setitem(MODELS, "dropout", dropout_student)
    config = small(
        tmp_path / "whole",
        student="dropout",
        data=DataConfig("digits", limit=200, labels_per_class=2),
        optimizer=OptimizerConfig(epochs=2),
        checkpoint_every=every,
        supervision=SupervisionConfig(kd=1.0),
    )
    run(config, observe=ignore)
    config = replace(config, out=str(tmp_path / "cut"))

    def interrupt(record):
        if not record.get("teacher") and (record["kind"], record["step"]) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, observe=interrupt)
    run(config, resume=True, observe=ignore)
    same_to_the_bit(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("victim", ["teacher", "student"])
def test_a_killed_process_goes_on_to_the_bit(tmp_path, victim):
    """SIGKILL in the middle, then --resume auto, against the same run left alone."""
    config = small(
        tmp_path / "whole",
        data=DataConfig("digits"),
        optimizer=OptimizerConfig(epochs=5),
        teacher=TeacherConfig(epochs=2),
        checkpoint_every=10,
    )
    run(config, observe=ignore)
    cut = tmp_path / "cut"
    arguments = [
        "train",
        "-c",
        str(tmp_path / "whole/config.yaml"),
        "--out",
        str(cut),
        "--resume",
        "auto",
    ]
    command = [sys.executable, "-m", "affkd_kernels.trainer.cli", *arguments]
    watched = (cut / "teacher" if victim == "teacher" else cut) / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for_lines(watched, 15 if victim == "teacher" else 40, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "summary.json").exists()
    assert (cut / "teacher/summary.json").exists() == (victim == "student")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    same_to_the_bit(tmp_path / "whole", cut)
    same_to_the_bit(tmp_path / "whole/teacher", cut / "teacher")


def wait_for_lines(path, count, process, seconds=300):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    pytest.fail(f"{path} did not reach {count} lines while the process ran")


def test_a_term_that_breaks_is_named_with_its_step(tmp_path):
    config = small(tmp_path / "run", loss=TermConfig())
    calls = []

    def relation(student, teacher):
        calls.append(1)
        value = torch.tensor(float("inf") if len(calls) == 3 else 0.5)
        return value, {"fine": torch.tensor(1.0), "broken": value}

    data = load_data(config.data)
    folder = RunFolder.create(tmp_path / "run", config.to_dict())

    def teacher(rows):
        return Outputs(torch.zeros(len(rows), 10), {})

    objective = Objective(SupervisionConfig(), relation)
    with pytest.raises(NonFiniteLossError, match="step 3: broken = inf") as error:
        Run(config, folder, data, objective, teacher, ignore).fit()
    assert error.value.terms.keys() == {"broken"} and error.value.step == 3
    assert records(tmp_path / "run")[-1]["terms"] == {"broken": "inf"}
    assert folder.summary() is None


def test_without_labels_only_the_relation_is_trained(tmp_path):
    config = small(tmp_path / "run", data=DataConfig("digits", limit=200, labels_per_class=0))
    run(config, observe=ignore)
    assert records(tmp_path / "run")[0]["terms"].keys() == {"relation"}


def test_nothing_to_minimize_is_an_error(tmp_path):
    data = DataConfig("digits", labels_per_class=0)
    with pytest.raises(ValueError, match="nothing to minimize"):
        run(small(tmp_path / "run", data=data, loss=TermConfig()), observe=ignore)
    assert not (tmp_path / "run").exists()


def test_a_teacher_checkpoint_is_used_as_it_is_and_its_model_checked(tmp_path):
    run(small(tmp_path / "first"), observe=ignore)
    checkpoint = str(tmp_path / "first/teacher/last.pt")
    config = small(tmp_path / "second", teacher=TeacherConfig(checkpoint=checkpoint))
    run(config, observe=ignore)
    assert not (tmp_path / "second/teacher").exists()
    assert records(tmp_path / "first") == records(tmp_path / "second")
    wrong = TeacherConfig("cnn_student", checkpoint=checkpoint)
    with pytest.raises(ValueError, match="holds a 'cnn_teacher'"):
        run(small(tmp_path / "third", teacher=wrong), observe=ignore)


def test_a_cached_teacher_answers_as_the_network_does(tmp_path):
    """Up to the rounding of another batch size."""
    terms = {
        "maps": replace(TERM, student_feature="features.maps", teacher_feature="features.maps")
    }
    found = []
    for cache in (True, False):
        out = tmp_path / str(cache)
        run(small(out, terms=terms, teacher=TeacherConfig(epochs=1, cache=cache)), observe=ignore)
        found.append([r["terms"] for r in records(out) if r["kind"] == "train"])
    assert found[0][0].keys() == {"cross_entropy", "relation", "maps"}
    for cached, fresh in zip(*found, strict=True):
        assert cached == pytest.approx(fresh, rel=1e-3)


def test_a_term_is_checked_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="preset fixes the triple"):
        build_objective(small(tmp_path, loss=TermConfig(preset="sp", affinity="gram")))
    with pytest.raises(ValueError, match="needs a preset or an affinity"):
        build_objective(small(tmp_path, loss=TermConfig(weight=2.0)))
    with pytest.raises(ValueError, match="both hold a term named 'relation'"):
        build_objective(small(tmp_path, terms={"relation": TERM}))
    with pytest.raises(ValueError):
        run(small(tmp_path / "run", loss=TermConfig(affinity="gam")), observe=ignore)
    assert not (tmp_path / "run").exists()
