"""A study: every combination once, weights from validation images, through a kill to one table."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from trainer_runs import same_to_the_bit

from affkd_kernels.trainer.cli import main
from affkd_kernels.trainer.config import (
    DataConfig,
    OptimizerConfig,
    TeacherConfig,
    TermConfig,
    TrainConfig,
)
from affkd_kernels.trainer.grid import work
from affkd_kernels.trainer.grid.config import GridConfig, SettingConfig
from affkd_kernels.trainer.grid.plan import Plan
from affkd_kernels.trainer.grid.run import Grid

FEW = SettingConfig(labels_per_class=0, score="neighbor_accuracy")


def small(out, **changes):
    base = TrainConfig(
        data=DataConfig("digits", limit=100),
        optimizer=OptimizerConfig(epochs=1),
        teacher=TeacherConfig(epochs=1),
        threads=1,
    )
    config = GridConfig(
        out=str(out),
        base=base,
        affinities=["cosine"],
        normalizations=["frobenius", "row_sum"],
        losses=["mse"],
        methods={"SP": {"sp": TermConfig("sp")}},
        shares=[1.0],
        seeds=[0, 1],
    )
    return replace(config, **changes)


def quiet(text):
    """Tell nothing."""


def table(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_plan_holds_every_valid_triple_and_names_the_others(tmp_path):
    config = small(
        tmp_path,
        affinities=["gram", "rbf(gamma=0.4)"],
        normalizations=["row_sum", "softmax"],
        losses=["mse", "kl"],
    )
    plan = Plan(config)
    # a row sum and its divergence need an affinity that is not negative
    assert set(plan.skipped) == {"gram / row_sum / mse", "gram / row_sum / kl"}
    assert [m.name for m in plan.methods[:2]] == ["CE", "KD"] and plan.methods[-1].name == "SP"
    assert len(plan.methods) == 2 + 6 + 1
    assert all(
        m.terms["relation"].options == {"reduction": "batchmean"} for m in plan.methods if m.triple
    )


def test_triples_that_are_not_valid_are_one_line_and_a_file(tmp_path):
    normalizations = ["row_sum", "mean(over=all)", "none"]
    config = small(tmp_path / "g", affinities=["gram"], normalizations=normalizations, seeds=[0])
    told = []
    Grid(replace(config, methods={}), told.append).run()
    path = tmp_path / "g/skipped.csv"
    assert told[0] == f"1 of 3 triples are valid; {path} has the others, with reasons"
    assert not any("row_sum" in text for text in told)
    with path.open() as file:
        rows = {row["triple"]: row["reason"] for row in csv.DictReader(file)}
    assert rows.keys() == {"gram / row_sum / mse", "gram / mean(over=all) / mse"}
    assert all("non-negative" in reason for reason in rows.values())


def test_a_study_has_a_row_for_each_run_and_trains_its_teacher_once(tmp_path):
    grid = Grid(small(tmp_path / "g", settings={"all": SettingConfig(), "none": FEW}), quiet)
    rows = grid.run()
    methods = ["CE", "KD", "cosine / frobenius / mse", "SP"]
    found = {(r["setting"], r["method"], r["seed"]) for r in rows}
    # without labels cross-entropy has nothing to learn from
    expected = {(s, m, seed) for s in ("all", "none") for m in methods for seed in (0, 1)}
    assert found == expected - {("none", "CE", 0), ("none", "CE", 1)}
    assert len(rows) == len(found)
    assert all(0 <= r["last"] <= 100 and r["failure"] is None for r in rows)
    assert all((r["best"] is None) == (r["setting"] == "none") for r in rows)
    assert [p.name for p in (tmp_path / "g/teachers").iterdir()] == ["cnn_teacher-final"]
    stored = [{k: "" if v is None else str(v) for k, v in r.items()} for r in rows]
    for row, line in zip(stored, table(tmp_path / "g"), strict=True):
        assert line.items() <= row.items()
    times = (tmp_path / "g/times.csv").read_text()
    assert times.startswith("stage,") and "step_milliseconds" in times


def test_a_run_of_a_study_is_repeated_by_its_configuration(tmp_path):
    Grid(small(tmp_path / "g", seeds=[3]), quiet).run()
    (cell,) = (tmp_path / "g/final").glob("**/SP/seed3")
    again = tmp_path / "again"
    assert main(["train", "-c", str(cell / "config.yaml"), "--out", str(again)]) == 0
    first, second = (json.loads((path / "summary.json").read_text()) for path in (cell, again))
    assert first["last"] == second["last"]


def test_a_level_is_chosen_by_validation_images_alone(tmp_path):
    config = small(tmp_path / "g", shares=[0.01, 1.0, 3.0], selection_seeds=[0, 5], seeds=[7])
    rows = Grid(config, quiet).run()
    tried = [r for r in rows if r["stage"] == "selection"]
    assert len(tried) == 2 * 3 * 2 and {r["seed"] for r in tried} == {0, 5}
    for method in ("cosine / frobenius / mse", "SP"):
        means = {
            level: sum(r["last"] for r in tried if (r["method"], r["level"]) == (method, level))
            for level in config.shares
        }
        (final,) = (r for r in rows if r["stage"] == "final" and r["method"] == method)
        assert means[final["level"]] == max(means.values())
    for stage, held in (("selection", 0.2), ("final", 0.0)):
        cells = list((tmp_path / "g" / stage).glob("**/config.yaml"))
        assert cells
        for path in cells:
            config = yaml.safe_load(path.read_text())
            assert config["data"]["validation"] == held
            assert f"cnn_teacher-{stage}" in config["teacher"]["checkpoint"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path, jobs):
    # no float32 holds it
    methods = {
        "broken": {"sp": TermConfig("sp", weight=1e300)},
        "SP": {"sp": TermConfig("sp", weight=1.0)},
    }
    config = small(
        tmp_path / "g",
        methods=methods,
        shares=[],
        weights=[1e3],
        normalizations=["frobenius"],
        seeds=[0],
        jobs=jobs,
    )
    rows = Grid(config, quiet).run()
    failed = [r for r in rows if r["failure"]]
    assert [r["method"] for r in failed] == ["broken"]
    assert failed[0]["last"] is None and "NonFiniteLossError" in failed[0]["failure"]
    assert all(r["last"] is not None for r in rows if r["method"] != "broken")


def test_a_launcher_trains_the_same(tmp_path):
    config = small(tmp_path / "one", normalizations=[], methods={}, seeds=[0])
    Grid(config, quiet).run()
    launched = replace(
        config, out=str(tmp_path / "two"), launcher=f"{sys.executable} {{arguments}}", jobs=2
    )
    Grid(launched, quiet).run()
    assert table(tmp_path / "one") == table(tmp_path / "two")
    # the teacher too: the machine that starts the runs may be none to train on
    assert (tmp_path / "two/teachers/cnn_teacher-final.log").read_text().count("accuracy") >= 1


def test_what_a_launcher_does_not_train_is_told_with_its_log(tmp_path):
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import subprocess, sys\n"
        "if not any('teachers' in argument for argument in sys.argv):\n"
        "    sys.exit('error: no teacher\\nthe scheduler says goodbye')\n"
        "sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))\n"
    )
    config = small(tmp_path / "g", normalizations=[], methods={}, seeds=[0])
    config = replace(config, launcher=f"{sys.executable} {launcher} {{arguments}}", jobs=2)
    rows = Grid(config, quiet).run()
    assert [r["method"] for r in rows] == ["CE", "KD"]
    for row in rows:
        assert "error: no teacher (" in row["failure"] and row["last"] is None
        (log,) = (tmp_path / "g/final").glob(f"**/{row['method']}/seed0.log")
        assert str(log) in row["failure"] and "goodbye" in log.read_text()
    with pytest.raises(RuntimeError, match="teacher 'cnn_teacher' was not trained.*exit code 1"):
        Grid(replace(config, out=str(tmp_path / "h"), launcher="false {arguments}"), quiet).run()


def test_processes_of_a_study_share_data_and_teacher(tmp_path, monkeypatch):
    loads = []
    load = work.load_data
    monkeypatch.setattr(work, "load_data", lambda config: loads.append(config) or load(config))
    work._load_data.cache_clear()
    work._load_teacher.cache_clear()
    settings = {"all": SettingConfig(), "few": SettingConfig(2), "none": FEW}
    Grid(small(tmp_path / "g", settings=settings, batch_sizes=[16, 64], seeds=[0]), quiet).run()
    assert len(loads) == 1
    # for the shares, for KD, and for the relational terms
    assert work._load_teacher.cache_info().misses == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_that_is_killed_ends_with_the_same_table(tmp_path, jobs):
    config = small(tmp_path / "whole", shares=[0.3, 1.0], seeds=[0], methods={})
    config = replace(config, base=replace(config.base, optimizer=OptimizerConfig(epochs=8)))
    torch.set_num_threads(1)
    Grid(config, quiet).run()
    recipe, cut = tmp_path / "grid.yaml", tmp_path / "cut"
    values = replace(config, out=str(cut), jobs=jobs).to_dict()
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    command = [sys.executable, "-m", "affkd_kernels.trainer.cli", "grid", "-c", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for_runs(cut, 2, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "results.csv").exists()
    # the processes of the killed study end by themselves and let go of its folders
    time.sleep(1.0 if jobs > 1 else 0.0)
    finished = written(cut, "summary.json")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert finished.items() <= written(cut, "summary.json").items()
    assert (cut / "results.csv").read_bytes() == (tmp_path / "whole/results.csv").read_bytes()


def wait_for_runs(folder, count, process, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(folder.glob("*/*/*/*/*/*/summary.json"))) >= count:
            return
        time.sleep(0.005)
    pytest.fail(f"the study did not finish {count} runs while it ran")


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_with_the_same_table(tmp_path, tally):
    """All of its processes by one SIGKILL, several times, wherever they happen to be."""
    config = small(tmp_path / "whole", shares=[0.3, 1.0], seeds=[0, 1])
    config = replace(config, base=replace(config.base, optimizer=OptimizerConfig(epochs=5)))
    torch.set_num_threads(1)
    started = time.monotonic()
    Grid(config, quiet).run()
    seconds = time.monotonic() - started
    recipe, cut = tmp_path / "grid.yaml", tmp_path / "cut"
    values = replace(config, out=str(cut), jobs=2).to_dict()
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    command = [sys.executable, "-m", "affkd_kernels.trainer.cli", "grid", "-c", str(recipe)]
    # a fifth of the work at most, so that there is some left to kill
    kills = kill_at_random(command, cut, [random.uniform(0, seconds / 5) for _ in range(5)])
    assert kills >= 3
    tally("times that all processes of a study were killed", kills)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert (cut / "results.csv").read_bytes() == (tmp_path / "whole/results.csv").read_bytes()
    summaries = sorted((tmp_path / "whole").glob("**/summary.json"))
    assert len(summaries) == 2 + 2 * 2 + 4 * 2
    for path in summaries:
        same_to_the_bit(path.parent, cut / path.parent.relative_to(tmp_path / "whole"))


def kill_at_random(command, folder, moments):
    """Start a study once for each moment, and kill it so many seconds after it began to train.

    Nothing that was finished is done again. Returns how often it was killed before its end.
    """
    for kills, moment in enumerate(moments):
        finished = written(folder, "summary.json")
        before = written(folder, "last.pt")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        while written(folder, "last.pt") == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moment)
        if process.poll() is not None:
            return kills
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert finished.items() <= written(folder, "summary.json").items()
    return len(moments)


def written(folder, name):
    """The files of this name, each with the time that it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"**/{name}")}


def test_another_study_is_refused_and_named(tmp_path):
    config = small(tmp_path / "g", seeds=[0], methods={})
    Grid(config, quiet).run()
    with pytest.raises(ValueError, match=r"holds another study: seeds was \[0\] and is \[0, 1\]"):
        Grid(replace(config, seeds=[0, 1]), quiet).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": []}, "give either shares or weights"),
        ({"weights": [1.0]}, "give either shares or weights"),
        ({"shares": [0.0]}, "must be positive"),
        ({"seeds": []}, "seeds must not be empty"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"shares": [1.0, 2.0], "validation": 0.0}, "validation must be a fraction above 0"),
        ({"launcher": "srun python"}, "launcher must contain {arguments}"),
    ],
)
def test_a_study_that_cannot_be_meant_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_methods_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two methods of the grid have one name: CE"):
        Plan(small(tmp_path, methods={"CE": {"sp": TermConfig("sp")}}))
