"""The benchmark suite on tiny shapes: what it measures, and when it keeps a figure to itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import crossover, measure, report, run, single, tables
from benchmarks.accuracy import Error, error_of, truth_form
from benchmarks.child import ChildFailed, run_module
from benchmarks.crossover import Point
from benchmarks.floor import FACTORED, PAIRS, floors
from benchmarks.measure import Timing, interleaved
from benchmarks.memory import extra_peak
from benchmarks.overhead import measure_overhead
from benchmarks.providers import AUTO, AUTO_AGAIN, Unavailable, make_provider
from benchmarks.registry import CASES, CHUNKED, EAGER, KEOPS, METHODS, SUITES, Case, select
from benchmarks.single import CaseRecord, Measured

TINY = Case("pkt", (16, 8), "small", ("quick",), against=(EAGER, CHUNKED), seconds=0.01)


# -- registry --


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_cases(suite: str) -> None:
    assert select(suite)


def test_every_method_is_measured_on_the_cpu() -> None:
    assert {case.method for case in select("cpu")} == set(METHODS)


def test_select_by_pattern() -> None:
    assert [case.name for case in select("quick", "sp-64x64")] == ["sp-64x64"]
    assert {case.method for case in select("cpu", "rkd_*")} == {"rkd_distance", "rkd_angle"}
    with pytest.raises(ValueError, match="matches no case of suite 'quick'.*sp-64x64"):
        select("quick", "nothing-like-it")
    with pytest.raises(ValueError, match="suite must be one of"):
        select("all")


@pytest.mark.parametrize(
    ("case", "extent"),
    [
        (Case("sp", (64, 3, 8, 8), "", ()), (1, 64, 64, 192)),
        (Case("compress", (6, 5), "", (), bank=15), (1, 6, 15, 5)),
        (Case("minilm_v2", (2, 3, 7, 5), "", ()), (6, 7, 7, 5)),
        (Case("nst", (2, 3, 4, 5), "", ()), (2, 20, 20, 3)),
        (Case("ickd", (2, 3, 4, 5), "", ()), (2, 3, 3, 20)),
    ],
)
def test_extent(case: Case, extent: tuple[int, ...]) -> None:
    assert case.extent == extent


# -- measuring --


def test_rounds_are_shuffled_and_every_call_that_counts_follows_one_that_does_not() -> None:
    calls: list[str] = []
    timed: list[str] = []

    def timer(step: measure.Step) -> float:
        step()
        timed.append(calls[-1])
        return 0.5

    steps = {name: lambda name=name: calls.append(name) for name in "abcd"}
    timings = interleaved(steps, 0.0, timer=timer, min_rounds=8)
    # how long a first call takes decides whether it counts
    first, rest = timed[:8], timed[8:]
    assert first[::2] == first[1::2]
    rounds = [first[::2], *(rest[i : i + 4] for i in range(0, len(rest), 4))]
    assert len(rounds) == 8
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len({tuple(order) for order in rounds}) > 3
    assert calls == [name for order in rounds for name in order for _ in range(2)]
    assert all(timing == Timing(0.5, 0.5, 0.5, 8) for timing in timings.values())


def test_slow_steps_are_not_warmed_and_very_slow_ones_not_repeated() -> None:
    durations = {"slow": 2 * measure.WARM_CALL_BELOW, "crawling": 2 * measure.TIMED_ONCE_ABOVE}
    calls = dict.fromkeys(durations, 0)
    current = ""

    def step(name: str) -> None:
        nonlocal current
        calls[name] += 1
        current = name

    def timer(run_step: measure.Step) -> float:
        run_step()
        return durations[current]

    steps = {name: lambda name=name: step(name) for name in durations}
    timings = interleaved(steps, 0.0, timer=timer, min_rounds=3)
    assert calls == {"slow": 3, "crawling": 1}
    assert [timings[name].calls for name in durations] == [3, 1]


def test_quantiles() -> None:
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Timing(2.0, 3.5, 5.0, 6)


def test_floor_counts_the_blocks() -> None:
    case = Case("pkt", (16, 8), "", ())
    found = floors(case)
    assert set(found) == {PAIRS, FACTORED}
    assert found[PAIRS].times == 1
    assert floors(Case("pkt", (1 << 17, 2), "", ()))[PAIRS].times == 1024
    assert set(floors(Case("pkt", (8, 16), "", ()))) == {PAIRS}
    assert not floors(Case("rkd_angle", (16, 8), "", ()))
    for floor in found.values():
        floor.step()


def test_error_of() -> None:
    truth = (torch.tensor(2.0), torch.tensor([3.0, 4.0]), torch.tensor([[0.0]]))
    values = (torch.tensor(2.5), torch.tensor([3.0, 4.0]), torch.tensor([[1.0]]))
    assert error_of(values, tuple(x.double() for x in truth)) == Error(0.25, 0.2)
    assert Error(1e-6, 1e-6).within(Error(0.0, 0.0))
    assert not Error(1e-6, 1.1e-6).within(Error(0.0, 0.0))
    assert Error(2.1e-5, 2.1e-5).within(Error(1.01e-5, 1.01e-5))
    assert not Error(math.nan, 0.0).within(Error(1.0, 1.0))


def test_truth_falls_back_where_eager_cannot_run() -> None:
    def name(method: str, items: int) -> str | None:
        form = truth_form(Case(method, (items, 8), "", ()))
        return form and form.name

    assert name("pkt", 8192) == "eager"
    assert name("pkt", 16384) == "chunked"
    assert name("sp", 262144) == "eager-features"
    assert name("pkt", 262144) is None


def test_a_case_is_measured() -> None:
    record = single.measure_case(TINY)
    timed = {name for name, m in record.providers.items() if m.seconds}
    assert {EAGER, CHUNKED, AUTO, AUTO_AGAIN, PAIRS} <= timed
    assert record.control_ratio is not None
    for name in (EAGER, CHUNKED, AUTO):
        error = record.providers[name].error
        assert error is not None and 0 < error.gradient < 1e-5
        assert record.providers[name].passes
    skipped = record.providers["factored"].skipped
    assert skipped is not None and "no closed form" in skipped


def test_a_case_is_measured_against_the_floor_alone() -> None:
    record = single.measure_case(TINY, baselines=False)
    timed = {name for name, m in record.providers.items() if m.seconds}
    assert {AUTO, AUTO_AGAIN, PAIRS} <= timed
    assert not {EAGER, CHUNKED} & set(record.providers)
    assert all(m.error is None and m.passes is None for m in record.providers.values())
    assert tables.floor_share(record.as_json() | {"noisy": False}) is not None


def test_a_wrong_loss_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    original = single.make_provider

    def wrong(name: str, case: Case) -> Any:
        return original(name, case if name == EAGER else Case("cc", case.shape, "", ()))

    monkeypatch.setattr(single, "make_provider", wrong)
    record = single.measure_case(Case("pkt", (16, 8), "small", (), (EAGER,), seconds=0.0))
    assert record.providers[AUTO].passes is False
    assert tables.speedup(record.as_json(), EAGER) is None


def test_unavailable_providers_say_why() -> None:
    with pytest.raises(Unavailable, match="no chunked form of rkd_angle"):
        make_provider(CHUNKED, Case("rkd_angle", (16, 8), "", ()))
    with pytest.raises(Unavailable, match="no KeOps form of cka|pykeops is not installed"):
        make_provider(KEOPS, Case("cka", (16, 8), "", ()))
    with pytest.raises(Unavailable, match="fewer items than features"):
        make_provider("factored", Case("sp", (16, 32), "", ()))
    with pytest.raises(Unavailable, match="would hold 32.0 GiB"):
        make_provider("cpp-dense", Case("sp", (1 << 16, 32), "", ()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_a_fresh_process() -> None:
    case = next(case for case in CASES if case.name == "pkt-2048x128")
    matrix = 2048 * 2048 * 4
    # the eager form holds at least the student's affinity, a product and a gradient
    assert 3 * matrix < extra_peak(case, EAGER) < 40 * matrix


def test_a_failing_process_says_why() -> None:
    with pytest.raises(ChildFailed, match="no case is called 'sp-1x1'"):
        run_module("benchmarks.memory", "sp-1x1", EAGER, timeout=60)
    with pytest.raises(ChildFailed, match="took longer than 0 s"):
        run_module("benchmarks.memory", "sp-1x1", EAGER, timeout=0.01)


def test_overhead_leaves_the_kernels_in_place() -> None:
    from affkd_kernels.kernels import lookup

    kernels = dict(lookup.loaded)
    measured = measure_overhead(seconds=0.01, rounds=5)
    assert kernels == lookup.loaded
    assert set(measured["seconds"]) == {"x.sum()", "module", "function"}
    assert measured["within"] == (measured["extra_seconds"]["module"] <= 25e-6)


# -- reporting --


def timing(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds, 3)


def record_of(own: float, again: float, *, passes: bool | None = True) -> dict[str, Any]:
    record = CaseRecord(
        "sp-9x9", "sp", "small", (9, 9), (1, 9, 9, 9), "float32", "highest", "default", None
    )
    record.plan = "cpp/dense: fits"
    record.providers = {
        EAGER: Measured(timing(8.0)),
        "eager-features": Measured(timing(6.0)),
        AUTO: Measured(timing(own), Error(0.0, 0.0), passes),
        AUTO_AGAIN: Measured(timing(again)),
        PAIRS: Measured(timing(1.0)),
        FACTORED: Measured(timing(0.5)),
    }
    return record.as_json()


def test_speedups_are_shown_only_where_quiet_and_right() -> None:
    assert tables.speedup(record_of(2.0, 2.0), EAGER) == 4.0
    assert tables.speedup_over_fastest(record_of(2.0, 2.0)) == 3.0
    assert tables.floor_share(record_of(2.0, 2.0)) == 0.5
    for noisy in (record_of(2.0, 2.2), record_of(2.0, 1.9)):
        assert noisy["noisy"]
        assert tables.speedup(noisy, EAGER) is None
        assert tables.floor_share(noisy) is None
        assert "noisy" in tables.case_line(noisy)
        assert "x" not in tables.summary([noisy]).splitlines()[-1]
    for unproven in (record_of(2.0, 2.0, passes=False), record_of(2.0, 2.0, passes=None)):
        assert tables.speedup(unproven, EAGER) is None
    assert "ERROR TOO LARGE" in tables.case_line(record_of(2.0, 2.0, passes=False))


def test_factored_is_held_to_its_own_floor() -> None:
    record = record_of(2.0, 2.0)
    record["plan"] = "torch/factored: many items"
    assert tables.floor_share(record) == 0.25


def test_summary_has_geometric_mean_and_worst() -> None:
    text = tables.summary([record_of(1.0, 1.0), record_of(4.0, 4.0)])
    assert "4.00x (worst 2.00x)" in text
    assert "2 of 2" in text


def test_memory_verdict() -> None:
    record = record_of(1.0, 1.0)
    record["extent"] = (1, 4096, 4096, 128)
    bound = 2 * 4096 * 128 * 4 + 8 * 2**20
    # auto is dense here, so its memory is not held to the bound of the tiled path
    record["providers"][AUTO]["extra_bytes"] = 2 * bound
    assert tables.memory_verdict(record) == (bound, "-")
    record["providers"]["cpp-tiled"] = {"extra_bytes": bound}
    assert tables.memory_verdict(record) == (bound, "yes")
    record["providers"]["cpp-tiled"] = {"extra_bytes": bound + 1}
    assert tables.memory_verdict(record) == (bound, "no")


def test_insert_keeps_the_page_around_the_markers() -> None:
    begin, end = "<!-- part: begin -->", "<!-- part: end -->"
    page = f"head\n{begin}\nold\n{end}\ntail\n"
    once = report.insert(page, "new", "part")
    assert once.startswith("head\n") and once.endswith("\ntail\n")
    assert "old" not in once and "new" in once
    assert report.insert(once, "new", "part") == once
    with pytest.raises(ValueError, match="must have .*end.* once, it has it 0 times"):
        report.insert(begin, "new", "part")


def test_run_writes_what_report_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "select", lambda suite, only: [TINY])
    monkeypatch.setattr(run, "measure_overhead", lambda: measure_overhead(0.01, 5))
    file = tmp_path / "tiny.json"
    assert run.main(["--suite", "quick", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [case["name"] for case in result["cases"]] == ["pkt-16x8"]
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks: begin -->\n<!-- benchmarks: end -->\n")
    assert report.main([str(file), "--update", str(page)]) == 0
    text = page.read_text()
    assert "| pkt-16x8 |" in text and "### Accuracy" in text
    result["schema"] = -1
    file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="has schema -1"):
        report.main([str(file)])


def test_run_starts_no_case_when_out_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "select", lambda suite, only: [TINY])
    monkeypatch.setattr(run, "measure_overhead", lambda: measure_overhead(0.01, 5))
    file = tmp_path / "tiny.json"
    assert run.main(["--minutes", "0", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["not_run"] == ["pkt-16x8"]
    capsys.readouterr()
    assert report.main([str(file)]) == 0
    assert "not run: pkt-16x8" in capsys.readouterr().out


def test_suite_gpu_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--suite", "gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    record = record_of(2.0, 2.0)
    record["providers"][EAGER]["extra_bytes"] = 1 << 20
    drawn = draw({"cases": [record]}, tmp_path, "tiny")
    assert {path.name for path in drawn} == {
        "tiny-speedup.png",
        "tiny-memory.png",
        "tiny-floor.png",
    }
    assert draw({"cases": []}, tmp_path, "nothing") == []


# -- crossover --


def test_crossover_between_two_sizes() -> None:
    points = [Point(1.0, 0.25), Point(4.0, 4.0), Point(8.0, 9.0)]
    assert crossover.crossover(points) == pytest.approx(2.0)
    assert crossover.crossover([Point(1.0, 2.0), Point(2.0, 3.0)]) == 1.0
    assert crossover.crossover([Point(1.0, 2.0), Point(2.0, 0.9)]) is None
    # a win before the last loss does not count
    late = [Point(1.0, 2.0), Point(2.0, 0.5), Point(8.0, 2.0)]
    assert crossover.crossover(late) == pytest.approx(4.0)


def test_crossover_compares_what_runs() -> None:
    ratio = crossover.compare("sp", (64, 4), "factored", ("reference",), seconds=0.01)
    assert ratio is not None and ratio > 0
    assert crossover.compare("pkt", (64, 4), "factored", ("reference",), seconds=0.01) is None
