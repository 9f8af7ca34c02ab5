"""The run folder: nothing overwritten, nothing half written, nothing executed."""

from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys

import pytest
import torch
import yaml

from affkd_kernels.trainer import run_folder
from affkd_kernels.trainer.config import DataConfig, TrainConfig
from affkd_kernels.trainer.errors import FileContentError, FolderInUseError
from affkd_kernels.trainer.run_folder import RunFolder, load_checkpoint, save_checkpoint

CONFIG = TrainConfig(data=DataConfig("digits")).to_dict()


def test_create_writes_what_was_asked_and_where(tmp_path):
    RunFolder.create(tmp_path / "run", CONFIG)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == CONFIG
    facts = json.loads((tmp_path / "run/env.json").read_text())
    assert facts["packages"]["torch"] and facts["threads"] == torch.get_num_threads()


def test_create_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty.*--resume auto"):
        RunFolder.create(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with RunFolder.create(tmp_path / "run", CONFIG), RunFolder.open(tmp_path / "run", CONFIG):
        pass


def test_open_refuses_another_configuration_and_names_the_field(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.append_metrics({"step": 1})
    other = TrainConfig(data=DataConfig("digits", batch_size=7)).to_dict()
    with pytest.raises(ValueError, match=r"data\.batch_size was 64 and is 7"):
        RunFolder.open(tmp_path / "run", other)
    RunFolder.open(tmp_path / "run", CONFIG).close()


def test_what_reaches_no_weight_may_change_between_two_attempts(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.append_metrics({"step": 1})
    changed = {**CONFIG, "out": "elsewhere/spelled", "log_every": 7, "threads": 3}
    RunFolder.open(tmp_path / "run", changed).close()


@pytest.mark.parametrize("enter", [RunFolder.create, RunFolder.open])
def test_a_folder_of_a_run_that_never_took_a_step_is_taken_again(tmp_path, enter):
    RunFolder.create(tmp_path / "run", CONFIG).close()
    other = {**CONFIG, "seed": 5}
    enter(tmp_path / "run", other).close()
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == other


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    code = (
        "import sys, pathlib, yaml\n"
        "from affkd_kernels.trainer.run_folder import RunFolder\n"
        "folder = RunFolder.open(pathlib.Path(sys.argv[1]), yaml.safe_load(sys.argv[2]))\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), yaml.safe_dump(CONFIG)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        for enter in (RunFolder.create, RunFolder.open):
            with pytest.raises(FolderInUseError, match="another process trains in.*run"):
                enter(tmp_path / "run", CONFIG)
        other.kill()
    RunFolder.open(tmp_path / "run", CONFIG).close()


@pytest.mark.parametrize("content", ["a: [", "- 1", ""])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, content):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.append_metrics({"step": 1})
    (tmp_path / "run/config.yaml").write_text(content)
    with pytest.raises(FileContentError, match=r"run/config\.yaml: not the configuration"):
        RunFolder.open(tmp_path / "run", CONFIG)


def test_a_torn_summary_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"ep')
    with pytest.raises(FileContentError, match=r"summary\.json: not the summary"):
        RunFolder(tmp_path).summary()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x04."])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(FileContentError, match=r"last\.pt: not a checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_cut_short_or_of_something_else_is_named(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"conv.weight": torch.ones(300)})
    with pytest.raises(FileContentError, match=r"last\.pt: not a checkpoint.*no weights"):
        load_checkpoint(path, ["weights"])
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FileContentError, match=r"last\.pt: not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("leftover", ["env.json", "config.yaml.partial", "env.json.partial"])
def test_open_starts_over_after_a_kill_before_the_configuration_was_there(tmp_path, leftover):
    (tmp_path / leftover).write_text("{")
    RunFolder.open(tmp_path, CONFIG)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {"step": lambda: 2})
    assert load_checkpoint(path) == {"step": 1}


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (pytest.fail, ("the checkpoint ran code",))

    torch.save({"weights": Payload()}, tmp_path / "last.pt")
    with pytest.raises(FileContentError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "last.pt")


def test_metrics_after_the_checkpoint_are_dropped_with_a_line_cut_short(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    for step in (10, 20, 30):
        folder.append_metrics({"step": step, "loss": 0.5})
    with folder.metrics.open("a") as file:
        file.write('[1]\n{"step": 2')
    folder.drop_metrics_after(20)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [
        10,
        20,
    ]


def test_metrics_hold_no_number_that_json_has_not(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="JSON"):
        folder.append_metrics({"step": 1, "loss": float("nan")})
