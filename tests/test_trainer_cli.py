"""The `affkd` command end to end, and what importing the losses must not bring along."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import affkd_kernels.trainer.doctor
from affkd_kernels.presets import list_presets
from affkd_kernels.trainer.cli import main
from affkd_kernels.trainer.commands import build_parser
from affkd_kernels.trainer.methods import COLUMNS, METHODS
from affkd_kernels.trainer.models import build_model
from affkd_kernels.trainer.report import read_results

QUICK = ("--data.name", "digits", "--data.limit", "150", "--threads", "1",
         "--optimizer.epochs", "1", "--teacher.epochs", "1")  # fmt: skip
RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
# the others are for affkd grid
RUNS = [path for path in RECIPES if not path.stem.startswith("study")]


def train(out, *arguments):
    return main(["train", *QUICK, "--out", str(out), *arguments])


def terms(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["terms"]


def test_train_takes_a_recipe_and_flags_over_it(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 5\nlog_every: 1\ndata: {batch_size: 50}\nloss: {preset: pkt}\n")
    flags = ["--loss.preset", "sp", "--loss.weight", "50", "--seed", "1"]
    assert main(["train", "-c", str(recipe), *QUICK, "--out", str(tmp_path / "run"), *flags]) == 0
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (config["seed"], config["data"]["batch_size"], config["loss"]["weight"]) == (1, 50, 50.0)
    assert terms(tmp_path / "run").keys() == {"cross_entropy", "sp"}
    printed = capsys.readouterr().out
    assert "test accuracy" in printed and str(tmp_path / "run") in printed.replace("\n", "")


def test_train_takes_a_triple(tmp_path):
    triple = ["--loss.affinity", "rbf(gamma=0.4)", "--loss.normalization", "frobenius"]
    assert train(tmp_path / "run", *triple, "--loss.loss", "mse", "--log_every", "1") == 0
    assert terms(tmp_path / "run").keys() == {"cross_entropy", "relation"}


def test_weight_and_options_reach_the_loss(tmp_path):
    common = ["--loss.preset", "rkd_distance", "--log_every", "1"]
    train(tmp_path / "one", *common, "--loss.weight", "1")
    train(tmp_path / "ten", *common, "--loss.weight", "10")
    train(tmp_path / "sum", *common, "--loss.options", "{reduction: sum}")
    first = [terms(tmp_path / name)["rkd_distance"] for name in ("one", "ten", "sum")]
    assert first[1] == pytest.approx(10 * first[0])
    assert first[2] == pytest.approx(64**2 * first[0], rel=1e-5)


def test_a_configuration_of_a_run_is_a_recipe_for_it(tmp_path, capsys):
    assert train(tmp_path / "run", "--loss.preset", "cka") == 0
    again = ["train", "-c", str(tmp_path / "run/config.yaml")]
    assert main(again) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main([*again, "--resume", "auto"]) == 0


@pytest.mark.parametrize("recipe", RUNS, ids=lambda path: path.stem)
def test_recipes_run(tmp_path, recipe):
    out = str(tmp_path / "run")
    assert main(["train", "-c", str(recipe), *QUICK, "--out", out]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["last"]["step"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss.preset", "spp"], "did you mean 'sp'"),
        (["--loss.affinity", "gam"], "gam"),
        (["--loss.preset", "sp", "--loss.student_feature", "feature"], "close to it: features"),
        (["--data.name", "cifar"], "valid are cifar10, cifar100, digits, folder, mnist5k"),
        (["--student", "resnet"], "valid are cnn_student, cnn_teacher"),
        (["--teacher.checkpoint", "no/such.pt", "--loss.preset", "sp"], "must be a file"),
        (["--teacher.model", "resnet", "--loss.preset", "sp"], "valid are cnn_student"),
        (["--optimizer.epochs", "0"], "epochs must be at least 1, got 0"),
        (["--optimizer.lr", "-1"], "lr must be at least 0, got -1.0"),
        (["--optimizer.warmup", "5"], "warmup must be a fraction"),
        (["--supervision.temperature", "0"], "temperature must be positive, got 0.0"),
        (["--data.limit", "3"], "limit must be at least 5, got 3"),
        (["--seed", "99999999999999999999999"], "seed must be from 0 to 2**63 - 1"),
        (["--loss.preset", "nst"], "must have shape [N, C, H, W]"),
        (["--terms", "{kd: {preset: sp}}"], "cannot be named 'kd'"),
        (["--import", "no_such_module"], "imports: 'no_such_module' cannot be imported"),
        (["--data.labels_per_class", "-1"], "labels_per_class must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(tmp_path, capsys, arguments, message):
    assert train(tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    # the corrected command must not find the folder taken
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_a_file_that_is_no_teacher_is_told_in_one_line(tmp_path, capsys, content):
    checkpoint = tmp_path / "teacher.pt"
    torch.save({"conv.weight": torch.ones(2)}, checkpoint)
    if content is not None:
        checkpoint.write_bytes(content)
    arguments = ["--loss.preset", "sp", "--teacher.checkpoint", str(checkpoint)]
    assert train(tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {checkpoint}: not a checkpoint") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_data_package_has_an_exit_code_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert train(tmp_path / "run") == 3
    assert "affkd-kernels[demo]" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["jsonargparse", "rich"])
def test_a_plain_install_is_told_which_extra_it_lacks(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from affkd_kernels.trainer.cli import main; sys.exit(main(['list']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert f"package '{missing}'" in found.stderr and "affkd-kernels[train]" in found.stderr


MODULE = """
import dataclasses
import torch
import affkd_kernels as affkd

@affkd.register_affinity
@dataclasses.dataclass(frozen=True)
class Manhattan(affkd.Affinity):
    name = "manhattan_of_{how}"

    def matrix(self, queries, keys):
        return torch.exp(-torch.cdist(queries, keys, p=1))
"""


@pytest.mark.parametrize("how", ["flag", "recipe"])
def test_a_module_of_ones_own_is_imported_from_the_current_folder(tmp_path, monkeypatch, how):
    (tmp_path / f"own_{how}.py").write_text(MODULE.format(how=how))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    given = ["--import", f"own_{how}"]
    if how == "recipe":
        (tmp_path / "recipe.yaml").write_text("imports: [own_recipe]\n")
        given = ["-c", "recipe.yaml"]
    name = f"manhattan_of_{how}"
    assert main(["train", *given, *QUICK, "--out", "run", "--loss.affinity", name]) == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["imports"] == [f"own_{how}"]


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args(["train", "--los.preset", "sp"])
    assert exit_.value.code == 2


def test_list_and_describe_know_every_preset(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for name in list_presets():
        assert f" {name} " in listed
        assert main(["describe", name]) == 0
        assert name in capsys.readouterr().out
    assert main(["describe", "no_such"]) == 2


def test_doctor_checks_the_backends_and_finds_a_wrong_one(capsys, monkeypatch):
    # two triples will do: where the tests run Triton, they run its interpreter
    monkeypatch.setattr(
        affkd_kernels.trainer.doctor, "TRIPLES", affkd_kernels.trainer.doctor.TRIPLES[:2]
    )
    assert main(["doctor"]) == 0
    healthy = capsys.readouterr().out
    assert torch.__version__ in healthy and "reference" in healthy and "WRONG" not in healthy
    right = affkd_kernels.trainer.doctor._loss_and_gradient

    def slightly_off(student, teacher, triple, backend, algorithm):
        loss, gradient = right(student, teacher, triple, backend, algorithm)
        return loss, gradient * (1.001 if backend == "torch" else 1)

    monkeypatch.setattr(affkd_kernels.trainer.doctor, "_loss_and_gradient", slightly_off)
    assert main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


def demo_arguments(out):
    return ["demo", "--out", str(out), "--data", "digits", "--limit", "100", "--epochs", "1"]


def test_demo_writes_a_table_of_every_method(tmp_path):
    out = tmp_path / "demo"
    assert main([*demo_arguments(out), "--seeds", "1"]) == 0
    results = read_results(out / "results.jsonl")
    assert {result.method for result in results} == {method.name for method in METHODS}
    report = (out / "report.md").read_text()
    assert f"{len(results)} of {len(results)} students" in report
    for method in METHODS:
        assert f"| {method.name} |" in report
    for column in COLUMNS:
        assert f"{column.setting}: {column.title}" in report
    assert (out / "plot.png").stat().st_size > 10_000
    assert main(demo_arguments(out)) == 2


def test_a_demo_without_matplotlib_keeps_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "demo"
    assert main([*demo_arguments(out), "--seeds", "1"]) == 0
    assert "no plot: it needs matplotlib" in capsys.readouterr().out
    report = (out / "report.md").read_text()
    assert "| CE |" in report and "plot.png" not in report and "first 100 training" in report


def test_a_demo_of_no_seeds_is_refused(tmp_path, capsys):
    assert main([*demo_arguments(tmp_path / "demo"), "--seeds", "0"]) == 2
    assert "seeds must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_row_of_the_demo_is_reproduced_by_its_configuration(tmp_path):
    out = tmp_path / "demo"
    assert main([*demo_arguments(out), "--seeds", "1"]) == 0
    student = next(path for path in (out / "students").iterdir() if "RKD" in path.name)
    again = tmp_path / "again"
    assert main(["train", "-c", str(student / "config.yaml"), "--out", str(again)]) == 0
    first, second = (json.loads((path / "summary.json").read_text()) for path in (student, again))
    assert first["last"] == second["last"]


def test_ctrl_c_leaves_a_partial_report(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "affkd_kernels.trainer.cli", *demo_arguments(out)]
    process = subprocess.Popen(
        [*command, "--seeds", "50"],
        stdout=subprocess.DEVNULL,
        # what a shell started in the background ignores the signal, and all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while len(read_results(out / "results.jsonl")) < 4 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    report = (out / "report.md").read_text()
    finished = len(read_results(out / "results.jsonl"))
    assert f"{finished} of {50 * 21} students" in report and "(1 of 50)" in report
    assert (out / "plot.png").exists()


def test_the_example_in_the_readme_runs():
    page = (Path(__file__).parent.parent / "README.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    student, teacher = (build_model(f"cnn_{role}", 1, 10, 0) for role in ("student", "teacher"))
    loader = [(torch.randn(8, 1, 8, 8), torch.arange(8))]
    names = {"torch": torch, "F": F, "student": student, "teacher": teacher, "loader": loader}
    exec(example, names)
    assert names["loss"].isfinite() and student.features.project.weight.grad.abs().sum() > 0


def test_the_losses_import_nothing_of_the_trainer():
    heavy = ["torchvision", "jsonargparse", "rich", "yaml", "matplotlib", "affkd_kernels.trainer"]
    code = f"import affkd_kernels, sys; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
