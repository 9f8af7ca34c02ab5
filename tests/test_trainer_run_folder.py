"""The run folder: nothing overwritten, nothing half written, nothing executed."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import yaml

from affkd_kernels.trainer.config import DataConfig, TrainConfig
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


def test_open_refuses_another_configuration_and_names_the_field(tmp_path):
    RunFolder.create(tmp_path / "run", CONFIG)
    other = TrainConfig(data=DataConfig("digits", batch_size=7)).to_dict()
    with pytest.raises(ValueError, match=r"data\.batch_size was 64 and is 7"):
        RunFolder.open(tmp_path / "run", other)
    RunFolder.open(tmp_path / "run", CONFIG)


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
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path / "last.pt")


def test_metrics_after_the_checkpoint_are_dropped_with_a_line_cut_short(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    for step in (10, 20, 30):
        folder.append_metrics({"step": step, "loss": 0.5})
    with folder.metrics.open("a") as file:
        file.write('{"step": 2')
    folder.drop_metrics_after(20)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [
        10,
        20,
    ]


def test_metrics_hold_no_number_that_json_has_not(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="JSON"):
        folder.append_metrics({"step": 1, "loss": float("nan")})
