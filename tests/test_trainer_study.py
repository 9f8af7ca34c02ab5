"""A study's report finds what was planted, finds nothing where nothing is, and its files parse."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from affkd_kernels.trainer.cli import main
from affkd_kernels.trainer.commands import build_parser
from affkd_kernels.trainer.config import (
    DataConfig,
    OptimizerConfig,
    TeacherConfig,
    TermConfig,
    TrainConfig,
)
from affkd_kernels.trainer.grid.config import GridConfig, PairConfig, SettingConfig
from affkd_kernels.trainer.grid.plan import Plan
from affkd_kernels.trainer.grid.run import KEYS, SCORES, TIMES, Grid
from affkd_kernels.trainer.published import published_table
from affkd_kernels.trainer.study import analysis
from affkd_kernels.trainer.study.analysis import analyze
from affkd_kernels.trainer.study.bootstrap import estimate_noise, intervals, pair_margins
from affkd_kernels.trainer.study.effects import additive_part, module_maps
from affkd_kernels.trainer.study.report import report_study
from affkd_kernels.trainer.study.results import read_study
from affkd_kernels.trainer.study.summary import of_case
from affkd_kernels.trainer.study.table import Table

AFFINITIES = ["gram", "cosine", "sqeuclidean", "rbf(gamma=0.4)"]
NORMALIZATIONS = ["none", "row_l2", "row_l1", "softmax"]
LOSSES = ["mse", "l1", "kl"]
PLANTED = {"rbf(gamma=0.4)": 5.0, "gram": -5.0}


def study_config(out, **changes):
    config = GridConfig(
        out=str(out),
        affinities=AFFINITIES,
        normalizations=NORMALIZATIONS,
        losses=LOSSES,
        methods={"SP": {"sp": TermConfig("sp")}},
        shares=[1.0, 3.0],
        seeds=[0, 1, 2],
    )
    return replace(config, **changes)


def write_study(folder, score, **changes):
    """A finished study whose final scores are ``score(method, seed)``; None is a failed run."""
    config = study_config(folder, **changes)
    folder.mkdir(parents=True)
    (folder / "grid.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config.to_dict()))))
    plan, lines = Plan(config), []
    for case, method, seed in product(plan.cases(), plan.methods, config.seeds):
        if not plan.possible(case, method):
            continue
        last = score(method, seed)
        triple = dict(zip(KEYS[6:9], method.triple or ("", "", ""), strict=True))
        lines.append(
            {
                "stage": "final",
                "teacher": case.pair.teacher,
                "student": case.pair.student,
                "setting": case.setting,
                "batch_size": case.batch_size,
                "method": method.name,
                **triple,
                "level": 3.0 if method.terms else None,
                "seed": seed,
                "score": plan.setting(case).score,
                "last": last,
                "best": None if last is None else last + 1.0,
                "best_epoch": None if last is None else 4 + seed,
                "failure": "it broke" if last is None else None,
                "step_milliseconds": 8.0,
                "relation_milliseconds": 2.0 if method.terms else None,
            }
        )
    for name, columns in (("results.csv", KEYS + SCORES), ("times.csv", KEYS + TIMES)):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)
    return folder


def noisy(seed=0, deviation=1.0, effect=lambda method: 0.0):
    """Scores with noise, a seed's own shift, and an effect."""
    generator = np.random.default_rng(seed)
    shifts = generator.normal(0, 3.0, size=100)

    def score(method, seed):
        return float(70 + shifts[seed] + effect(method) + generator.normal(0, deviation))

    return score


def planted(method):
    return PLANTED.get(method.triple[0], 0.0) if method.triple else 0.0


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(analysis, "DRAWS", 1500)
    monkeypatch.setattr(analysis, "METHOD_DRAWS", 1500)


def null_values(generator, seeds, units, spreads=1.0):
    values = generator.normal(size=(seeds, units)) * spreads
    return values + generator.normal(size=(seeds, 1)) * 5


@pytest.mark.parametrize(("seeds", "units"), [(3, 3), (3, 6), (5, 5)])
def test_where_nothing_differs_the_nominal_share_is_found(seeds, units):
    generator = np.random.default_rng(units)
    contrasts = np.eye(units) - 1 / units
    alone, together = [], []
    for _ in range(400):
        values = null_values(generator, seeds, units)
        noise = estimate_noise(values, np.ones(units), generator, draws=800)
        found = intervals(values, contrasts, noise, families=1)
        alone.append((np.abs(found.estimates) > found.half_width).mean())
        together.append((np.abs(found.estimates) > found.simultaneous).any())
    # four standard errors of a share of 400; those of one study hang together, so no fewer
    assert abs(np.mean(alone) - 0.05) < 4 * max(np.std(alone) / 20, 0.005)
    assert abs(np.mean(together) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 400)


def test_the_best_of_many_equals_is_not_taken_for_better():
    generator = np.random.default_rng(3)
    wrong = []
    for _ in range(150):
        values = null_values(generator, 3, 20)
        noise = estimate_noise(values, np.ones(20), generator, draws=600)
        means = values.mean(0)
        best = int(means.argmax())
        wrong.append((means[best] - means > pair_margins(noise, best, families=1)).any())
    assert np.mean(wrong) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)


def test_a_whole_study_of_equals_reports_nothing_clear(tmp_path, few_draws):
    clear, alone, count = [], 0, 0
    for seed in range(6):
        found = analyze(read_study(write_study(tmp_path / str(seed), noisy(seed)))).differences
        clear.append(any(d.clear for d in found))
        alone, count = alone + sum(d.suggested for d in found), count + len(found)
    assert sum(clear) <= 1
    # all differences from one baseline share its noise, so the share of few studies varies
    assert alone / count < 0.2


def test_planted_effects_are_found_and_no_others(tmp_path, few_draws):
    folder = write_study(tmp_path / "s", noisy(4, effect=planted))
    (case,) = analyze(read_study(folder)).cases
    affinity, normalization, loss = case.effects
    clear = {name for name, d in affinity.differences.items() if d.clear}
    assert clear >= PLANTED.keys()
    for name, effect in PLANTED.items():
        found = affinity.differences[name]
        assert abs(found.estimate - effect) < found.simultaneous
    for other in (normalization, loss):
        assert not any(d.clear for d in other.differences.values())
    assert case.additive > 0.8
    # equals of the best stay beside it, and what lies ten deviations behind does not
    by_affinity = {a: {m.name for m in case.triples if m.triple[0] == a} for a in AFFINITIES}
    assert by_affinity["rbf(gamma=0.4)"] <= set(case.contenders)
    assert not by_affinity["gram"] & set(case.contenders)
    text = " ".join(of_case(case, study_config("s")))
    assert "rbf(gamma=0.4) (+" in text and "loss: no level stands out" in text


def test_effects_are_those_of_the_module_whatever_company_its_levels_keep():
    plan = Plan(study_config("s"))
    triples = [method.triple for method in plan.methods if method.triple]
    assert len(triples) < len(AFFINITIES) * len(NORMALIZATIONS) * len(LOSSES)
    sizes = [np.random.default_rng(i).normal(size=4) for i in range(3)]
    names = [AFFINITIES, NORMALIZATIONS, LOSSES]
    scores = np.array([sum(sizes[i][names[i].index(t[i])] for i in range(3)) + 60 for t in triples])
    for index, found in enumerate(module_maps(triples)):
        given = np.array([sizes[index][names[index].index(level)] for level in found.levels])
        means = found.rows @ scores
        np.testing.assert_allclose(means - means.mean(), given - given.mean(), atol=1e-9)
        # a row's noise is what independent triples give it
        np.testing.assert_allclose(found.scales**2, np.diag(found.rows @ found.rows.T))
    assert additive_part(triples, scores) == pytest.approx(1.0)
    # the plain mean of a loss would mix in the normalizations that it goes with
    plain = [scores[[t[2] == loss for t in triples]].mean() for loss in LOSSES]
    assert not np.allclose(np.diff(plain), np.diff(sizes[2][:3]), atol=1e-2)


def test_modules_that_are_never_varied_apart_have_no_effects():
    together = [(a, n, n) for a in "ab" for n in "xyz"]
    assert [found.module for found in module_maps(together)] == ["affinity"]
    assert module_maps([("a", "x", "y")]) == [] and module_maps([]) == []


def test_what_a_seed_does_to_all_changes_no_interval():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(3, 5))
    shifted = values + np.array([[100.0], [-50.0], [7.0]])
    contrasts = np.eye(5) - 1 / 5
    first, second = (
        intervals(v, contrasts, estimate_noise(v, np.ones(5), np.random.default_rng(1), 500), 1)
        for v in (values, shifted)
    )
    for name in ("estimates", "half_width", "simultaneous"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=1e-9)


def test_a_noisy_baseline_has_wide_intervals():
    generator = np.random.default_rng(5)
    values = generator.normal(size=(5, 12))
    contrasts = np.eye(12)[1:] - np.eye(12)[0]
    widths = []
    for factor in (1.0, 6.0):
        scaled = values * np.where(np.arange(12) == 0, factor, 1.0)
        noise = estimate_noise(scaled, np.ones(12), np.random.default_rng(1), 1000)
        widths.append(intervals(scaled, contrasts, noise, 1).half_width.mean())
    assert widths[1] > 2.5 * widths[0]


def test_results_without_any_noise_give_intervals_of_no_width(tmp_path, few_draws):
    # of binary fractions, which means leave exact
    def score(method, seed):
        return 64.0 + seed + planted(method)

    folder = write_study(tmp_path / "s", score, seeds=[0, 1, 2, 3])
    (case,) = analyze(read_study(folder)).cases
    for found in case.differences:
        assert all(d.half_width < 1e-9 for d in found.differences.values())


def report_of(folder):
    report_study(folder)
    return folder / "report"


def markdown_tables(text):
    blocks = [b for b in text.split("\n\n") if b.startswith("|")]
    return [[[c.strip() for c in line.split("|")[1:-1]] for line in b.splitlines()] for b in blocks]


def test_every_file_of_a_report_parses(tmp_path, few_draws):
    settings = {"few": SettingConfig(10), "none": SettingConfig(0, "neighbor_accuracy")}
    folder = write_study(tmp_path / "s", noisy(1, effect=planted), settings=settings)
    out = report_of(folder)
    tables = markdown_tables((out / "report.md").read_text())
    assert len(tables) == 4
    assert all(len({len(line) for line in table}) == 1 for table in tables)
    methods = list(csv.DictReader((out / "methods.csv").open()))
    plan = Plan(study_config(folder, settings=settings))
    assert len(methods) == sum(plan.possible(c, m) for c in plan.cases() for m in plan.methods)
    for row in methods:
        scores = [r for r in csv.DictReader((folder / "results.csv").open()) if same(r, row)]
        assert float(row["last"]) == pytest.approx(np.mean([float(r["last"]) for r in scores]))
        assert float(row["best"]) == pytest.approx(float(row["last"]) + 1)
        assert float(row["best_epoch"]) == 5.0
        relational = row["method"] not in ("CE", "KD")
        assert row["relation_share"] == ("0.25" if relational else "")
        assert bool(row["minus_ce"]) == (row["setting"] == "few" and row["method"] != "CE")
        assert bool(row["minus_kd"]) == (row["method"] != "KD")
    effects = list(csv.DictReader((out / "effects.csv").open()))
    assert len(effects) == 2 * (len(AFFINITIES) + len(NORMALIZATIONS) + len(LOSSES))
    for module in ("affinity", "normalization", "loss"):
        sizes = [float(r["effect"]) for r in effects if r["module"] == module]
        assert sum(sizes) == pytest.approx(0, abs=1e-9)
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) == 4
    for path in pictures:
        assert (
            path.read_bytes().startswith(b"\x89PNG")
            and f"({path.name})" in (out / "report.md").read_text()
        )


def same(line, row):
    return all(line[name] == row[name] for name in ("setting", "method"))


def test_latex_is_escaped_and_rectangular():
    text = Table("a_b: 5 %", ["x_y", "z"], [["p & q", "1±2"], ["{~^\\}", "#$"]]).latex()
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [line.count("&") - line.count(r"\&") for line in body] == [1, 1, 1]
    assert r"\caption{a\_b: 5 \%}" in text and r"1$\pm$2" in text and r"\#\$" in text
    assert r"\{\textasciitilde{}\textasciicircum{}\textbackslash{}\}" in text
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1


def test_one_study_has_one_report(tmp_path, few_draws):
    folder = write_study(tmp_path / "s", noisy(2))
    names = ("report.md", "methods.csv", "effects.csv", "tables.tex")
    first = [(report_of(folder) / name).read_bytes() for name in names]
    assert first == [(report_of(folder) / name).read_bytes() for name in names]


def test_published_figures_stand_beside_runs_of_their_pair_alone(tmp_path, few_draws):
    pairs = [PairConfig("vgg13", "vgg8"), PairConfig("vgg13", "resnet8")]
    folder = write_study(
        tmp_path / "s",
        noisy(0),
        base=TrainConfig(data=DataConfig("cifar100")),
        pairs=pairs,
        settings={"all": SettingConfig(), "few": SettingConfig(10)},
        affinities=["gram"],
        normalizations=["row_l2"],
        losses=["mse"],
    )
    rows = csv.DictReader((report_of(folder) / "methods.csv").open())
    shown = {(r["student"], r["setting"], r["method"]): r["published"] for r in rows}
    known = published_table()["vgg13", "vgg8"]
    columns = {"CE": "student", "KD": "kd", "SP": "sp"}
    for (student, setting, method), figure in shown.items():
        expected = known.get(columns.get(method)) if (student, setting) == ("vgg8", "all") else None
        assert figure == ("" if expected is None else str(expected))


def test_what_failed_is_named_and_not_compared(tmp_path, few_draws):
    scores = noisy(0)

    def broken(method, seed):
        return None if method.name == "SP" and seed == 1 else scores(method, seed)

    folder = write_study(tmp_path / "s", broken)
    text = (report_of(folder) / "report.md").read_text()
    assert "1 of" in text and "are not compared: SP." in text
    rows = {r["method"]: r for r in csv.DictReader((folder / "report/methods.csv").open())}
    assert (rows["SP"]["seeds"], rows["SP"]["failed"], rows["SP"]["minus_ce"]) == ("2", "1", "")


def test_one_seed_has_scores_and_no_intervals(tmp_path):
    folder = write_study(tmp_path / "s", noisy(0), seeds=[0])
    text = (report_of(folder) / "report.md").read_text()
    assert "nothing tells the noise" in text and "±" not in text
    assert not (folder / "report/effects.csv").read_text().strip()


def test_without_matplotlib_the_rest_is_written(tmp_path, few_draws, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = report_of(write_study(tmp_path / "s", noisy(0)))
    assert not list(out.glob("*.png")) and "![" not in (out / "report.md").read_text()


def test_a_study_that_cannot_be_reported_is_told_in_a_line(tmp_path, capsys):
    folder = write_study(tmp_path / "s", noisy(0))
    (folder / "results.csv").write_text("stage,nonsense\nfinal,1\n")
    assert main(["report", str(folder)]) == 2
    assert f"error: {folder / 'results.csv'}: not a table of affkd grid" in capsys.readouterr().err
    (folder / "results.csv").unlink()
    assert main(["report", str(folder)]) == 2
    assert "not finished: it has no results.csv" in capsys.readouterr().err
    (folder / "grid.yaml").write_text("out: [")
    assert main(["report", str(folder)]) == 2
    assert "not the configuration of a study" in capsys.readouterr().err


def test_a_grid_and_its_report_from_end_to_end(tmp_path, capsys):
    base = TrainConfig(
        data=DataConfig("digits", limit=100),
        optimizer=OptimizerConfig(epochs=1),
        teacher=TeacherConfig(epochs=1),
        threads=1,
    )
    changes = {"affinities": ["gram", "cosine"], "normalizations": ["frobenius"], "losses": ["mse"]}
    config = study_config(tmp_path / "s", base=base, shares=[1.0], seeds=[0, 1], **changes)
    Grid(config, lambda text: None).run()
    assert main(["report", str(tmp_path / "s")]) == 0
    shown = capsys.readouterr().out
    assert "Best triples" in shown and "gram / frobenius / mse" in shown
    (table, *_) = markdown_tables((tmp_path / "s/report/report.md").read_text())
    assert {line[0] for line in table[2:]} == {m.name for m in Plan(config).methods}
    assert table[0][-2:] == ["step, ms", "relation"]


def test_the_terminal_shows_what_the_page_says(tmp_path, few_draws):
    folder = write_study(tmp_path / "s", noisy(0, effect=planted))
    console = Console(record=True, width=140, file=io.StringIO())
    page = report_study(folder, console).read_text()
    shown = console.export_text()
    sentences = [line[2:] for line in page.splitlines() if line.startswith("- ")]
    assert len(sentences) > 5 and all(f"- {line}" in shown for line in sentences)


def test_the_recipe_of_the_study_holds_what_it_promises():
    path = Path(__file__).parent.parent / "recipes/study.yaml"
    parser = build_parser()
    options = parser.instantiate(parser.parse_args(["grid", "-c", str(path)]))["grid"]
    options.pop("config", None)
    config = GridConfig(**options)
    plan = Plan(config)
    triples = [method.triple for method in plan.methods if method.triple]
    used = [len({triple[i] for triple in triples}) for i in range(3)]
    assert used[0] >= 6 and used[1] >= 5 and used[2] >= 3
    assert [found.module for found in module_maps(triples)] == ["affinity", "normalization", "loss"]
    assert len(config.shares) == 3 and len(config.seeds) >= 3
    assert not set(config.seeds) & set(config.selection_seeds)
    assert {s.labels_per_class for s in config.settings.values()} == {10, 0}
    methods = len(plan.methods)
    text, chosen = path.read_text(), 3 * 2 * (methods - 2)
    reported = len(config.seeds) * (2 * methods - 1)
    assert f"{len(triples)} valid triples" in text
    assert f"{chosen} short runs" in text and f"{reported} are reported" in text
