"""The GPU suite of the benchmarks: what it would measure, and how it tells it, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from case_inputs import pair

from benchmarks import gpu, gpu_tables, measure, rates, report, run
from benchmarks.chunked import RECIPES, chunked_loss
from benchmarks.floor import FACTORED, PAIRS, floors
from benchmarks.inputs import make_inputs
from benchmarks.liger import CompiledSweep, liger_style_loss
from benchmarks.measure import CpuTimer, Timing
from benchmarks.providers import (
    AUTO,
    AUTO_AGAIN,
    AUTO_EXACT,
    EAGER_FAST,
    EAGER_FLOAT,
    make_provider,
    provider_names,
)
from benchmarks.rates import FLOOR_GRAPH, FLOOR_OPS, PRODUCTS
from benchmarks.registry import COMPILE, EAGER, LIGER, MAX_AUTOTUNE, SUITES, Case, select

# invented, for the tables' sake
RATES = {"copy": 2e12, **dict.fromkeys(PRODUCTS, 1e14)}
TINY = Case("pkt", (16, 8), "small", (), (EAGER, COMPILE, MAX_AUTOTUNE), 0, precision="high")


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that needs a GPU replaced, so that the rest of the way can be walked."""
    monkeypatch.setattr(gpu, "make_inputs", lambda case, device: make_inputs(case))
    monkeypatch.setattr(gpu, "floors", lambda case, device: floors(case))
    monkeypatch.setattr(gpu, "DeviceTimer", CpuTimer)
    monkeypatch.setattr(rates, "WallTimer", CpuTimer)
    monkeypatch.setattr(gpu, "count_launches", lambda step: step() and 3)
    monkeypatch.setattr(gpu, "extra_peak_on_gpu", lambda provider, inputs: 1 << 20)
    monkeypatch.setattr(
        gpu, "launch_floors", lambda n: {FLOOR_OPS: lambda: n, FLOOR_GRAPH: lambda: n}
    )


@pytest.fixture(autouse=True)
def _precision_as_before() -> Any:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_the_suite_ends_within_eight_minutes_of_which_one_is_the_last_case_s() -> None:
    assert SUITES["gpu"] <= 7


def test_the_cases_with_figures_to_reach_come_first() -> None:
    cases = select("gpu")
    first = [case.name for case in cases[:12]]
    for name in ("pkt-256x512-high", "pkt-4096x512-high", "rbf_frobenius-32768x512-bfloat16"):
        assert name in first
    assert {case.shape[0] for case in cases} >= {64, 128, 256, 512, 1024, 4096, 32768, 1 << 20}
    assert any(case.method == "sp" and case.shape == (1 << 20, 512) for case in cases)


def test_eager_is_measured_exactly_and_as_the_case_allows() -> None:
    names = provider_names(TINY)
    assert {EAGER, EAGER_FAST, AUTO, AUTO_AGAIN, AUTO_EXACT} <= set(names)
    precisions = {name: make_provider(name, TINY).precision for name in (*names, "cpp-dense")}
    assert precisions[EAGER] == precisions[AUTO_EXACT] == "highest"
    for name in (EAGER_FAST, COMPILE, MAX_AUTOTUNE, AUTO, AUTO_AGAIN, "cpp-dense"):
        assert precisions[name] == "high"
    half = Case("pkt", (16, 8), "huge", (), (EAGER,), dtype="bfloat16")
    assert EAGER_FLOAT in provider_names(half) and EAGER_FAST not in provider_names(half)
    make_provider(EAGER_FAST, TINY).step(make_inputs(TINY))
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("method", ["pkt", "rkd_distance", "rbf_frobenius", "compress"])
def test_liger_style_is_the_chunked_loss(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import liger

    monkeypatch.setattr(liger.torch, "compile", lambda function: function)
    liger._block.cache_clear()
    student, teacher = pair(3, 24, 5, teacher_dim=7).features
    options = {}
    if method == "compress":
        options["student_keys"] = torch.randn(30, 5, dtype=torch.float64)
        options["teacher_keys"] = torch.randn(30, 7, dtype=torch.float64)
    values = []
    for form in (chunked_loss, liger_style_loss):
        leaf = student.clone().requires_grad_()
        loss = form(RECIPES[method], leaf, teacher, **options)
        values.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    liger._block.cache_clear()
    torch.testing.assert_close(*values)


def test_liger_style_blocks_are_about_as_large_as_the_features() -> None:
    features = torch.zeros(4096, 512)
    sweep = CompiledSweep(RECIPES["pkt"], features, features, None, None)
    blocks = list(sweep.blocks())
    assert [blocks[0].stop, blocks[-1].stop, len(blocks)] == [512, 4096, 8]


def test_a_case_is_walked_through(on_the_cpu: None) -> None:
    record = gpu.measure_on_gpu(Case("pkt", (16, 8), "small", (), (EAGER,), seconds=0.01), _plenty)
    for name in (EAGER, AUTO, AUTO_AGAIN):
        measured = record.providers[name]
        assert measured.seconds and measured.wall and measured.launches == 3
        assert measured.extra_bytes == 1 << 20 and measured.passes
    assert record.providers[FLOOR_GRAPH].wall and record.providers[PAIRS].seconds
    assert record.providers[PAIRS].wall is None
    json.dumps(record.as_json())


def test_what_fails_is_recorded_and_the_rest_goes_on(
    on_the_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 TiB")

    monkeypatch.setattr(gpu, "true_values", out_of_memory)
    case = Case("pkt", (16, 8), "small", (), (EAGER, COMPILE), seconds=0.01)
    record = gpu.measure_on_gpu(case, lambda: 10.0)
    assert record.providers[COMPILE].skipped == "out of time to compile it"
    assert record.providers[AUTO].seconds and record.providers[AUTO].passes is None
    assert gpu_tables.speedup(record.as_json(), (EAGER,)) is None
    assert "out of time to compile it" in gpu_tables.case_line(record.as_json())


def test_a_burst_is_timed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "WallTimer", lambda: lambda step: step() or 0.6)
    calls = dict.fromkeys(("short", "long"), 0)

    def step(name: str) -> None:
        calls[name] += 1

    steps = {name: lambda name=name: step(name) for name in calls}
    single = {"short": Timing(1e-3, 1e-3, 1e-3, 3), "long": Timing(1.0, 1.0, 1.0, 3)}
    timings = rates.bursts(steps, single, 0.0)
    assert timings["short"].median == pytest.approx(0.06) and timings["long"].median == 0.6
    # three rounds, each with an untimed burst before the timed one
    assert calls == {"short": 60, "long": 6}


def _plenty() -> float:
    return 1e6


def record_of(case: Case, on: dict[str, float], **facts: Any) -> dict[str, Any]:
    """A record with invented wall times; the device's are a tenth."""
    from benchmarks.accuracy import Error
    from benchmarks.single import CaseRecord, Measured

    record = CaseRecord(
        *(case.name, case.method, case.regime, case.shape, case.extent),
        *(case.dtype, case.precision, "default", "triton/dense: invented"),
    )
    for name, seconds in on.items():
        device, wall = (Timing(s, s, s, 3) for s in (seconds / 10, seconds))
        measured = Measured(device, Error(1e-7, 2e-7), True, 1 << 20, wall=wall, launches=3)
        record.providers[name] = measured
    return record.as_json() | facts


def test_the_table_has_ratios_shares_and_errors() -> None:
    case = Case("pkt", (1024, 512), "small", (), precision="high")
    wall = {EAGER: 8.0, COMPILE: 6.0, MAX_AUTOTUNE: 4.0, AUTO: 2.0, AUTO_AGAIN: 2.0, LIGER: 5.0}
    record = record_of(case, {name: seconds * 1e-4 for name, seconds in wall.items()})
    header, _, row = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in gpu_tables.results([record], RATES).splitlines()
    )
    cells = dict(zip(header, row, strict=True))
    assert cells["ours, wall"] == "200 us" and cells["ours, device"] == "20 us"
    assert cells["vs eager"] == "4.00x" and cells["vs compiled"] == "2.00x"
    assert cells[LIGER] == "500 us" and cells["triton-tiled"] == "-"
    # 4 B^2 D in 20 us
    flops = 4 * 1024**2 * 512 / 20e-6
    assert cells["TFLOP/s"] == f"{flops / 1e12:.3g}"
    assert cells["of the products' peak"] == f"{100 * flops / 1e14:.0f} % of tf32"
    assert cells["launches"] == "3" and cells["MB, ours"] == "1.0"
    assert cells["loss error"] == "1.0e-07" and cells["gradient error"] == "2.0e-07"


def test_no_ratio_where_the_control_or_the_error_forbids_it() -> None:
    on = {EAGER: 8e-4, AUTO: 2e-4, AUTO_AGAIN: 2e-4}
    assert gpu_tables.speedup(record_of(TINY, on), (EAGER,)) == 4.0
    noisy = record_of(TINY, on | {AUTO_AGAIN: 3e-4})
    assert gpu_tables.speedup(noisy, (EAGER,)) is None
    by_the_clock = record_of(TINY, on)
    by_the_clock["providers"][AUTO_AGAIN]["wall"]["median"] *= 1.1
    assert not by_the_clock["noisy"] and gpu_tables.speedup(by_the_clock, (EAGER,)) is None
    wrong = record_of(TINY, on)
    wrong["providers"][AUTO]["passes"] = False
    assert gpu_tables.speedup(wrong, (EAGER,)) is None


def test_useful_work() -> None:
    def work(case: Case) -> float:
        return gpu_tables.useful_flops(record_of(case, {}))

    assert work(Case("pkt", (64, 32), "", ())) == 4 * 64 * 64 * 32
    assert work(Case("compress", (64, 32), "", (), bank=128)) == 6 * 64 * 128 * 32
    assert work(Case("clip_affinity", (64, 32), "", (), bank=64)) == 8 * 64 * 64 * 32
    factored = record_of(Case("sp", (640, 32), "", ()), {}, plan="torch/factored: invented")
    assert gpu_tables.useful_flops(factored) == 8 * 640 * 32 * 32
    assert gpu_tables.useful_bytes(factored) == 4 * 3 * 640 * 32
    assert gpu_tables.peak_of(record_of(TINY, {})) == "tf32"


def test_the_run_prints_the_table_and_the_report_reads_the_file(
    on_the_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(case: Case, left: Any) -> Any:
        if case.method == "sp":
            raise RuntimeError("an invented failure")
        return gpu.measure_on_gpu(case, left)

    cases = [Case(method, (16, 8), "small", (), (EAGER,), seconds=0.01) for method in ("sp", "pkt")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "describe_machine", lambda device: _MACHINE)
    monkeypatch.setattr(run, "measure_rates", lambda: RATES)
    monkeypatch.setattr(run, "measure_overhead", lambda: _OVERHEAD)
    monkeypatch.setattr(run, "measure_on_gpu", failing)
    monkeypatch.setattr(run, "select", lambda suite, only: cases)
    file = tmp_path / "gpu.json"
    assert run.main(["--suite", "gpu", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "sp-16x8 failed: an invented failure" in printed
    assert "| pkt-16x8 |" in printed and "copy, TB/s" in printed
    assert report.main([str(file)]) == 0
    assert "an invented failure" in capsys.readouterr().out


_MACHINE = {
    **{"device": "cuda", "processor": "x", "cores": 1, "threads": 1, "instruction_set": "x"},
    **{"python": "3", "versions": {}, "commit": None, "modified": None, "load_at_start": 0.0},
    **{"gpu": "an invented GPU", "cuda": "13.0", "float32_matmul_precision": "highest"},
}
_OVERHEAD: dict[str, Any] = {"seconds": {}, "extra_seconds": {}}


def test_no_benchmark_needs_more_than_torch() -> None:
    """The GPU machine may be offline, and then has little else."""
    absent = ("rich", "matplotlib", "hypothesis", "psutil", "yaml")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import benchmarks.run, benchmarks.report, benchmarks.crossover, benchmarks.roofline\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_case_is_measured_on_a_gpu() -> None:
    case = Case("pkt", (256, 64), "small", (), (EAGER,), seconds=0.1, precision="high")
    record = gpu.measure_on_gpu(case, _plenty)
    for name in (EAGER, AUTO, AUTO_EXACT):
        assert record.providers[name].wall and record.providers[name].extra_bytes
    assert record.providers[FLOOR_GRAPH].wall
    measured = rates.measure_rates(0.1)
    assert set(measured) == {"copy", *PRODUCTS} and min(measured.values()) > 1e9
    assert measure.DeviceTimer()(lambda: None) < 1e-3
    assert FACTORED not in record.providers or record.providers[FACTORED].seconds
