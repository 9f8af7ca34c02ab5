"""The recipes of the standard comparison, its published figures, its path on tiny data."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from affkd_kernels.features import FeatureCapture
from affkd_kernels.presets import describe
from affkd_kernels.trainer.assess import retrieval_precision, top_accuracy
from affkd_kernels.trainer.cli import main
from affkd_kernels.trainer.commands import build_parser, configuration
from affkd_kernels.trainer.data.tiny import write_tiny_cifar
from affkd_kernels.trainer.models import MODELS, build_model
from affkd_kernels.trainer.models.stages import stage_pairs
from affkd_kernels.trainer.objective import build_relation
from affkd_kernels.trainer.optimizer import learning_rate
from affkd_kernels.trainer.published import published_accuracy, published_table
from affkd_kernels.trainer.run_folder import RunFolder
from affkd_kernels.trainer.runs import report_runs

RECIPES = Path(__file__).parent.parent / "recipes/cifar100"
PAIRS = sorted((RECIPES / "pairs").glob("*.yaml"))
METHODS = sorted((RECIPES / "methods").glob("*.yaml"))


def recipe(pair, method=None, *arguments):
    """The configuration of a pair and a method, as the command reads it."""
    files = [RECIPES / "base.yaml", pair, *([method] if method else [])]
    flags = [flag for file in files for flag in ("-c", str(file))]
    parser = build_parser()
    parsed = parser.parse_args(["train", *flags, *arguments])
    return configuration(parser.instantiate(parsed)["train"])[0]


def test_every_pair_of_the_comparison_has_a_recipe_and_figures():
    pairs = {(c.teacher.model, c.student) for c in map(recipe, PAIRS)}
    assert len(PAIRS) == 13 and pairs == set(published_table())
    for (teacher, student), row in published_table().items():
        assert {teacher, student} <= MODELS.keys()
        assert row.keys() == {"teacher", "student", "kd", "sp", "pkt", "rkd", "nst", "crd"}
        assert all(50 < figure < 90 for figure in row.values()) and row["teacher"] > row["student"]


def test_a_network_has_one_figure_of_its_own_in_all_pairs():
    for side in ("teacher", "student"):
        figures = {}
        for (teacher, student), row in published_table().items():
            name = teacher if side == "teacher" else student
            assert figures.setdefault(name, row[side]) == row[side]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda path: path.stem)
def test_a_recipe_trains_as_published(pair):
    config = recipe(pair)
    small = config.student.startswith(("mobilenet", "shufflenet"))
    steps = 782 * 240
    rates = [
        learning_rate(config.optimizer, 782 * epoch, steps) for epoch in (0, 149, 150, 180, 239)
    ]
    first = 0.01 if small else 0.05
    assert rates == pytest.approx([first, first, first / 10, first / 100, first / 1000])
    assert config.optimizer.name == "sgd" and not config.optimizer.nesterov
    assert (config.optimizer.weight_decay, config.data.batch_size) == (5e-4, 64)
    assert (config.data.crop_padding, config.data.flip) == (4, True)
    assert (config.teacher.lr, config.teacher.epochs) == (0.05, 240)


def test_methods_have_their_published_weights_and_features():
    configs = {method.stem: recipe(PAIRS[0], method) for method in METHODS}
    assert configs.keys() == {"kd", "sp", "pkt", "rkd", "nst"}
    features = {"sp": "features.maps", "nst": "stages"}
    for name, config in configs.items():
        for term in config.terms.values():
            assert term.weight == describe(term.preset).published_weight
            asked = features.get(name, "features")
            assert (term.student_feature, term.teacher_feature) == (asked, asked)
        assert config.supervision.cross_entropy == (0.1 if name == "kd" else 1.0)
    assert configs["rkd"].terms.keys() == {"rkd_distance", "rkd_angle"}


# networks of three stages, of four, and of four with their names apart
@pytest.mark.parametrize(
    ("pair", "count"),
    [("resnet56-resnet20", 3), ("resnet32x4-shufflenet_v2", 3), ("vgg13-mobilenet_v2_half", 4)],
)
def test_neuron_selectivity_is_the_published_sum_over_the_stages(pair, count):
    config = recipe(RECIPES / f"pairs/{pair}.yaml", RECIPES / "methods/nst.yaml")
    networks = [build_model(name, 3, 10, 0) for name in (config.student, config.teacher.model)]
    taps = (config.student_features(), config.teacher_features())
    images = torch.randn(2, 3, 32, 32)
    features = []
    for network, paths in zip(networks, taps, strict=True):
        with FeatureCapture(network.double(), paths) as captured, torch.no_grad():
            network(images.double())
            features.append({path: captured[path] for path in paths})
    total, terms = build_relation(config.relational_terms())(*features)
    assert list(terms) == [f"nst_{number}" for number in range(1, count + 1)]
    expected = 0.0
    for ours, theirs in stage_pairs(config.student, config.teacher.model):
        expected += 50.0 * discrepancy(features[0][ours], features[1][theirs])
    assert total.item() == pytest.approx(expected.item(), rel=1e-10)


def discrepancy(student, teacher):
    """The squared maximum mean discrepancy of the channels with the kernel (a.b)^2."""
    side = min(student.shape[2], teacher.shape[2])
    student, teacher = (
        F.normalize(F.adaptive_avg_pool2d(x, side).flatten(2), dim=2) for x in (student, teacher)
    )

    def kernel(a, b):
        return (a @ b.mT).square().mean()

    return kernel(student, student) + kernel(teacher, teacher) - 2 * kernel(student, teacher)


def test_every_pair_has_stages_that_belong_together():
    for student, teacher in {(c.student, c.teacher.model) for c in map(recipe, PAIRS)}:
        assert len(stage_pairs(student, teacher)) in (3, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student", "vgg8"], "student 'vgg8' has 4 and the teacher 'resnet56' has 3"),
        (["--student", "cnn_student"], "student 'cnn_student' are not known"),
        (["--terms.nst.teacher_feature", "features"], "must both be 'stages' or neither"),
    ],
)
def test_stages_that_do_not_fit_are_told(flags, message):
    config = recipe(RECIPES / "pairs/resnet56-resnet20.yaml", RECIPES / "methods/nst.yaml", *flags)
    with pytest.raises(ValueError, match=message):
        config.relational_terms()


def test_a_run_stands_beside_its_published_figure():
    pair = RECIPES / "pairs/resnet32x4-resnet8x4.yaml"
    row = published_table()["resnet32x4", "resnet8x4"]
    for method in METHODS:
        assert published_accuracy(recipe(pair, method).to_dict()) == row[method.stem]
    assert {method.stem for method in METHODS} < row.keys()
    assert published_accuracy(recipe(pair).to_dict()) == row["student"]
    teacher = recipe(pair, None, "--student", "resnet32x4")
    assert published_accuracy(teacher.to_dict()) == row["teacher"]
    for other in (
        ["--loss.affinity", "gram"],
        ["--loss.preset", "cka"],
        ["--supervision.kd", "1"],
        ["--student", "resnet8"],
        ["--data.name", "cifar10"],
    ):
        assert published_accuracy(recipe(pair, METHODS[-1], *other).to_dict()) is None


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    """A teacher and three students on a tiny CIFAR-100, each by its command."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_cifar(folder / "data", train=128, test=120)
    recipes = [str(RECIPES / "base.yaml"), str(RECIPES / "pairs/wrn_40_2-wrn_16_2.yaml")]
    common = [*("-c", recipes[0], "-c", recipes[1], "--data.root", str(folder / "data")),
              *("--data.verify", "false", "--threads", "1", "--teacher.model", "resnet8"),
              *("--student", "wrn_16_1", "--optimizer.epochs", "2")]  # fmt: skip
    teacher = [*common, "--teacher.epochs", "1", "--out", str(folder / "runs/teacher")]
    assert main(["teacher", *teacher]) == 0
    common += ["--teacher.checkpoint", str(folder / "runs/teacher/last.pt")]
    for method in ("sp", "rkd", "nst"):
        chosen = ["-c", str(RECIPES / f"methods/{method}.yaml")]
        assert main(["train", *common, *chosen, "--out", str(folder / "runs" / method)]) == 0
    return folder


def test_the_real_path_runs_on_a_tiny_data_set(tiny_runs, capsys):
    for name in ("teacher", "sp", "rkd", "nst"):
        run = tiny_runs / "runs" / name
        assert main(["eval", str(run)]) == 0
        printed = capsys.readouterr().out
        scores = json.loads((run / "evaluation-last.json").read_text())
        summary = json.loads((run / "summary.json").read_text())
        assert scores["top1"] == pytest.approx(summary["last"]["test_accuracy"])
        assert scores["neighbors"] == pytest.approx(summary["last"]["neighbor_accuracy"])
        assert scores["top1"] <= scores["top5"] <= 100 and 0 < scores["retrieval"] <= 100
        assert ("cka" in scores) == ("CKA" in printed) == (name != "teacher")
        assert summary["cost"]["step_milliseconds"] > 0


def test_a_report_has_our_figures_beside_the_published_ones(tiny_runs, capsys):
    assert main(["report", str(tiny_runs / "runs")]) == 0
    printed = capsys.readouterr().out
    with (tiny_runs / "runs/runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [
        "CE",
        "CE + 25 rkd_distance + 50 rkd_angle",
        "CE + 3000 sp",
        "CE + 50 nst",
    ]
    for line, name in zip(lines, ("teacher", "rkd", "sp", "nst"), strict=True):
        summary = json.loads((tiny_runs / "runs" / name / "summary.json").read_text())
        assert line["last"] == f"{summary['last']['test_accuracy']:.2f}"
        # these networks are none of the published pairs
        assert line["published"] == "-"
        assert f"| {line['method']} |" in printed
    assert main(["report", str(tiny_runs / "data")]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_runs_of_several_seeds_are_one_line_with_its_published_figure(tmp_path):
    config = recipe(RECIPES / "pairs/resnet32x4-resnet8x4.yaml", RECIPES / "methods/sp.yaml")
    for seed, accuracy in ((0, 72.0), (1, 74.0)):
        folder = RunFolder.create(tmp_path / str(seed), replace(config, seed=seed).to_dict())
        scores = {"test_accuracy": accuracy, "epoch": 240}
        cost = {"step_milliseconds": 20.0, "relation_milliseconds": 1.0}
        folder.write_summary({"last": scores, "best": scores, "cost": cost})
        folder.close()
    table = report_runs(tmp_path)
    published = published_table()["resnet32x4", "resnet8x4"]["sp"]
    row = f"| 240 | 2 | 73.00±1.41 | 73.00±1.41 | {published:.2f} | {73 - published:+.2f} |"
    assert row in table and "| 20.0 | 5.0 % |" in table


def test_an_evaluation_takes_the_data_where_it_is_now(tiny_runs, capsys):
    run, data = tiny_runs / "runs/sp", tiny_runs / "data"
    data.rename(tiny_runs / "moved")
    try:
        assert main(["eval", str(run)]) == 3
        assert "get http" in capsys.readouterr().err
        assert main(["eval", str(run), "--root", str(tiny_runs / "moved")]) == 0
    finally:
        (tiny_runs / "moved").rename(data)


def test_an_evaluation_of_no_run_is_told_in_one_line(tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert "is no run folder: it has no config.yaml" in capsys.readouterr().err


def test_top_accuracy_counts_labels_among_the_best():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0]])
    labels = torch.tensor([0, 1, 0, 2])
    assert [top_accuracy(logits, labels, count) for count in (1, 2, 5)] == [25.0, 75.0, 100.0]


def test_retrieval_precision_agrees_with_a_loop():
    features, labels = torch.randn(60, 4), torch.randint(0, 4, (60,))
    labels[7] = 9  # relevant to nobody
    precisions = []
    for query in range(60):
        similarity = F.cosine_similarity(features, features[query : query + 1])
        order = [i for i in similarity.argsort(descending=True).tolist() if i != query]
        hits, found = 0, []
        for rank, other in enumerate(order, start=1):
            if labels[other] == labels[query]:
                hits += 1
                found.append(hits / rank)
        if found:
            precisions.append(sum(found) / len(found))
    expected = 100 * sum(precisions) / len(precisions)
    assert len(precisions) == 59
    assert retrieval_precision(features, labels) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(retrieval_precision(features, torch.arange(60)))
