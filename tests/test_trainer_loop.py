"""The loop: repeatable to the bit, through a kill too, and loud about a loss that breaks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from trainer_runs import TERM, ignore, records, same_to_the_bit, small

from affkd_kernels.trainer.config import (
    DataConfig,
    OptimizerConfig,
    SupervisionConfig,
    TeacherConfig,
    TermConfig,
)
from affkd_kernels.trainer.data import load_data
from affkd_kernels.trainer.errors import FileContentError
from affkd_kernels.trainer.loop import Run
from affkd_kernels.trainer.models import MODELS, build_model
from affkd_kernels.trainer.networks import Teacher
from affkd_kernels.trainer.objective import NonFiniteLossError, Objective, Outputs, build_term
from affkd_kernels.trainer.rehearsal import gradient_shares, rehearse
from affkd_kernels.trainer.report import progress_line
from affkd_kernels.trainer.run import build_objective, run
from affkd_kernels.trainer.run_folder import RunFolder
from affkd_kernels.trainer.step import batch_order, initial_student


def test_a_run_leaves_its_records_and_trains_its_teacher_first(tmp_path):
    seen = []
    summary = run(small(tmp_path / "run"), observe=seen.append)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock",
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
    assert [bool(r.get("teacher")) for r in seen] == [True] * 5 + [False] * 6
    assert seen[5]["kind"] == "gradient_shares"
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

    def teacher(rows, images):
        return Outputs(torch.zeros(len(rows), 10), {})

    objective = Objective(SupervisionConfig(), relation)
    with pytest.raises(NonFiniteLossError, match="step 3: broken = inf") as error:
        Run(config, folder, data, objective, teacher, ignore).fit()
    assert error.value.terms.keys() == {"broken"} and error.value.step == 3
    assert records(tmp_path / "run")[-1]["terms"] == {"broken": "inf"}
    assert folder.summary() is None


def test_weights_that_break_in_the_last_step_are_found_by_the_evaluation(tmp_path):
    config = small(
        tmp_path / "run",
        data=DataConfig("digits", limit=64),
        loss=TermConfig(),
        optimizer=OptimizerConfig("sgd", lr=1e30, epochs=1),
    )
    with pytest.raises(NonFiniteLossError, match="in the evaluation after step 1: test_loss"):
        run(config, observe=ignore)
    assert records(tmp_path / "run")[-1]["kind"] == "non_finite"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (TermConfig("sp", options={"reduction": "none"}), "must return a scalar"),
        (TermConfig("nst"), r"must have shape \[N, C, H, W\]"),
        (TermConfig("sp", student_feature="feature"), "close to it: features"),
    ],
)
def test_a_mistake_is_told_before_the_teacher_is_trained(tmp_path, loss, message):
    with pytest.raises(ValueError, match=message):
        run(small(tmp_path / "run", loss=loss), observe=ignore)
    assert not (tmp_path / "run").exists()


def test_a_rehearsal_leaves_no_trace_in_the_random_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "dropout", dropout_student)
    config = small(tmp_path, student="dropout", loss=TermConfig())
    before = torch.get_rng_state()
    rehearse(config, load_data(config.data), build_objective(config))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["cross_entropy", "kd"])
def test_a_term_cannot_take_the_name_of_a_supervised_one(tmp_path, name):
    with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
        run(small(tmp_path / "run", terms={name: TERM}), observe=ignore)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("normalization", "reduction", "warns"),
    [
        ("frobenius", "mean", "matrixmean"),
        ("frobenius", "batchmean", "matrixmean"),
        ("frobenius", "matrixmean", None),
        ("row_l2", "mean", "batchmean"),
        ("row_l2", "batchmean", None),
        ("none", "mean", None),
    ],
)
def test_a_term_that_vanishes_is_told_with_the_reduction_that_does_not(
    tmp_path, normalization, reduction, warns
):
    term = TermConfig(None, "cosine", normalization, options={"reduction": reduction})
    seen = []
    run(small(tmp_path / "run", loss=term), observe=seen.append)
    (record,) = (r for r in seen if r["kind"] == "gradient_shares")
    assert record["shares"].keys() == {"cross_entropy", "relation"}
    assert sum(record["shares"].values()) == pytest.approx(1)
    assert len(record["warnings"]) == (warns is not None)
    if warns:
        assert f"reduction: {warns}" in record["warnings"][0]
        assert record["shares"]["relation"] < 0.01
        assert record["warnings"][0] in progress_line(record)


def test_gradient_shares_are_those_of_the_gradients(tmp_path):
    config = small(tmp_path, supervision=SupervisionConfig(cross_entropy=0.5))
    data = load_data(config.data)
    teacher_model = build_model("cnn_teacher", 1, 10, 1)
    shares = gradient_shares(config, data, Teacher(teacher_model, ["features"], data.train_images))
    student = initial_student(config, data)
    batch = next(batch_order(config, data).epoch())
    features = student.features(data.train_images[batch.rows])
    labels = data.train_labels[batch.rows]
    cross_entropy = 0.5 * torch.nn.functional.cross_entropy(student.head(features), labels)
    target = teacher_model.features(data.train_images[batch.rows])
    relation = build_term("relation", TERM)(features, target)
    norms = []
    for loss in (cross_entropy, relation):
        gradients = torch.autograd.grad(
            loss, student.parameters(), retain_graph=True, allow_unused=True
        )
        norms.append(sum(g.square().sum() for g in gradients if g is not None).sqrt().item())
    expected = {"cross_entropy": norms[0] / sum(norms), "relation": norms[1] / sum(norms)}
    assert shares["shares"] == pytest.approx(expected, rel=1e-4)


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
    for data in (DataConfig("digits", limit=200, split_seed=7), DataConfig("digits", limit=100)):
        with pytest.raises(ValueError, match=r"last\.pt: this network was trained on other data"):
            run(replace(config, out=str(tmp_path / "third"), data=data), observe=ignore)
    wrong = TeacherConfig("cnn_student", checkpoint=checkpoint)
    with pytest.raises(ValueError, match="holds a 'cnn_teacher'"):
        run(small(tmp_path / "third", teacher=wrong), observe=ignore)
    # nothing was trained, so nothing is in the way of the corrected command
    assert not (tmp_path / "third").exists()


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


@pytest.mark.parametrize("damage", ["weights", "order"])
def test_a_checkpoint_of_another_network_is_named_on_resume(tmp_path, damage):
    config = small(tmp_path / "run", loss=TermConfig())
    run(config, observe=ignore)
    (tmp_path / "run/summary.json").unlink()
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    torch.save({**state, damage: {"other": torch.ones(1)}}, tmp_path / "run/last.pt")
    with pytest.raises(FileContentError, match=r"last\.pt: not a checkpoint of this run"):
        run(config, resume=True, observe=ignore)
