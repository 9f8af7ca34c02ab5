"""The fused kernels on a real GPU: streams, graphs, devices, determinism, precision, size.

What they compute is checked by the tests of every other implementation, with ``--device cuda``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels.lookup import missing, module_of
from affkd_kernels.kernels.result import Needs
from affkd_kernels.presets import preset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PKT = ("cosine(shifted=True)", "row_sum", "kl")
RKD = ("euclidean", "mean", "smooth_l1")
HOWS = [(backend, algorithm) for backend in ("cpp", "triton") for algorithm in ("dense", "tiled")]


@pytest.fixture(params=HOWS, ids="-".join)
def how(request: pytest.FixtureRequest) -> dict[str, str]:
    backend, algorithm = request.param
    reason = missing(backend, "cuda")
    if reason is not None:
        pytest.skip(reason)
    return {"backend": backend, "algorithm": algorithm}


def features(*shape: int, seed: int = 0, device: str = "cuda") -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


def step(student: Tensor, teacher: Tensor, *triple: str, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = affkd.affinity_loss(leaf, teacher, *(triple or PKT), **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def error(values: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    """The larger of the two relative errors."""
    return max(
        float((x.double() - y.double()).norm() / y.double().norm())
        for x, y in zip(values, exact, strict=True)
    )


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "self": dict,
    "mask": lambda: {"mask": torch.arange(200, device="cuda") % 3 > 0, "reduction": "batchmean"},
    "pairs": lambda: {"pair_mask": features(200, 200, seed=5) > 0, "diagonal": "exclude"},
    "weight": lambda: {"row_weight": features(200, seed=6).abs(), "reduction": "sum"},
    "keys": lambda: {
        "student_keys": features(300, 64, seed=7),
        "teacher_keys": features(300, 48, seed=8),
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_the_host_never_waits(name: str, how: dict[str, str]) -> None:
    student, teacher, options = features(200, 64), features(200, 48, seed=1), CALLS[name]()
    expected = step(student, teacher, **options, **how)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = step(student, teacher, **options, **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, values, expected))


def test_a_scale_stays_on_the_device(how: dict[str, str]) -> None:
    student, teacher = features(100, 32), features(100, 32, seed=1)
    scale = torch.tensor(0.7, device="cuda", requires_grad=True)
    options = {"student_scale": scale, "teacher_scale": torch.tensor(0.5, device="cuda")}
    triple = ("gram", "softmax", "kl")
    exact = affkd.affinity_loss(student, teacher, *triple, **options, backend="reference")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = affkd.affinity_loss(student, teacher, *triple, **options, **how)
        (gradient,) = torch.autograd.grad(loss, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss, exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, scale)[0], rtol=1e-3, atol=1e-5)


def test_a_cuda_graph_replays_on_new_values(how: dict[str, str]) -> None:
    student, teacher = features(150, 64), features(150, 64, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(student, teacher, **how)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(student, teacher, **how)
    for seed in (2, 3):
        student.copy_(features(150, 64, seed=seed))
        graph.replay()
        assert all(map(torch.equal, captured, step(student, teacher, **how)))


def test_the_current_stream_is_taken(how: dict[str, str]) -> None:
    teacher = features(150, 64, seed=1)
    expected = step(features(150, 64), teacher, **how)
    late = torch.zeros(150, 64, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # the features arrive long after the kernels were launched
        torch.cuda._sleep(50_000_000)
        late.copy_(features(150, 64))
        values = step(late, teacher, **how)
    stream.synchronize()
    assert all(map(torch.equal, values, expected))


def test_threads_do_not_meet(how: dict[str, str]) -> None:
    """Each has a stream of its own, and calls first for what another thread has called for."""
    teacher = features(150, 64, seed=9)
    students = [features(150, 64, seed=seed) for seed in range(4)]
    expected = [step(student, teacher, **how) for student in students]
    torch.cuda.synchronize()

    def calls(student: Tensor) -> list[tuple[Tensor, Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream()):
            values = [step(student, teacher, **how) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return values

    with ThreadPoolExecutor(len(students)) as pool:
        for found, same in zip(pool.map(calls, students), expected, strict=True):
            assert all(all(map(torch.equal, values, same)) for values in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_taken(how: dict[str, str]) -> None:
    expected = step(features(150, 64), features(150, 64, seed=1), **how)
    there = (x.to("cuda:1") for x in (features(150, 64), features(150, 64, seed=1)))
    values = step(*there, **how)
    assert all(x.device.index == 1 for x in values)
    assert all(torch.equal(x.to("cuda:0"), y) for x, y in zip(values, expected, strict=True))


@pytest.mark.parametrize("triple", [PKT, RKD], ids=["pkt", "rkd_distance"])
def test_calls_agree_bitwise(triple: tuple[str, ...], how: dict[str, str]) -> None:
    student, teacher = features(1500, 96), features(1500, 128, seed=1)
    first = step(student, teacher, *triple, **how)
    for _ in range(5):
        assert all(map(torch.equal, step(student, teacher, *triple, **how), first))


# float32 products with the error that each setting is known for
@pytest.mark.parametrize(
    ("setting", "bound"), [("highest", 1e-5), ("high", 1e-5), ("medium", 1e-2)]
)
@pytest.mark.parametrize("triple", [PKT, RKD], ids=["pkt", "rkd_distance"])
def test_the_precision_follows_the_setting(
    setting: str, bound: float, triple: tuple[str, ...], how: dict[str, str]
) -> None:
    student, teacher = features(600, 256), features(600, 192, seed=1)
    exact = step(student.double(), teacher.double(), *triple, backend="reference")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert error(step(student, teacher, *triple, **how), exact) < bound
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_are_exact_inputs(dtype: torch.dtype, how: dict[str, str]) -> None:
    student, teacher = (x.to(dtype) for x in (features(600, 256), features(600, 192, seed=1)))
    exact = step(student.double(), teacher.double(), backend="reference")
    loss, gradient = step(student, teacher, **how)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert error((loss, loss), (exact[0], exact[0])) < 1e-4
    assert error((gradient, gradient), (exact[1], exact[1])) < 2 * torch.finfo(dtype).eps


EVERYDAY = ("sp", "pkt", "rkd_distance", "cc", "rbf_frobenius")


@pytest.mark.parametrize(
    "name, backend",
    [*((name, backend) for name in EVERYDAY for backend in ("cpp", "triton")), ("irg_edge", "cpp")],
)
def test_the_everyday_batch_takes_three_launches(name: str, backend: str) -> None:
    from benchmarks.rates import count_launches

    if missing(backend, "cuda"):
        pytest.skip(str(missing(backend, "cuda")))
    spec = preset(name).spec
    inputs, _ = canonical_inputs(spec, features(256, 512), features(256, 512, seed=1))
    kernels = module_of(backend, "cuda")
    launches = count_launches(lambda: kernels.loss_and_grad(spec, inputs, Needs(), "dense"))
    if launches is None:
        pytest.skip("launches cannot be traced here")
    assert launches <= 3


def test_tiled_holds_no_matrix(how: dict[str, str]) -> None:
    if how["algorithm"] != "tiled":
        pytest.skip("dense holds two")
    student, teacher = features(16384, 64), features(16384, 64, seed=1)
    step(student, teacher, **how)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(student, teacher, **how)
    torch.cuda.synchronize()
    # one matrix is 1 GiB
    assert torch.cuda.max_memory_allocated() - before < 400 << 20


def test_more_than_two_to_the_31_pairs(how: dict[str, str]) -> None:
    if how["algorithm"] != "tiled":
        pytest.skip("two matrices would be 19 GB")
    student, teacher = features(49152, 16), features(49152, 16, seed=1)
    exact = step(student.double(), teacher.double(), "gram", "row_l2", "mse", algorithm="factored")
    assert error(step(student, teacher, "gram", "row_l2", "mse", **how), exact) < 1e-4


@pytest.mark.parametrize("batch", [64, 1000])
def test_compiled_calls_stay_one_graph(batch: int) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        affkd.AffinityLoss(*PKT), fullgraph=True, dynamic=True, backend=counter
    )
    for size in (batch, batch + 16, batch + 40):
        student, teacher = features(size, 32).requires_grad_(), features(size, 48, seed=1)
        value = compiled(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        expected = step(student, teacher)
        torch.testing.assert_close((value.detach(), gradient), expected)
    assert counter.frame_count == 1


def test_the_angle_loss_agrees_with_the_cpu_s() -> None:
    student, teacher = features(90, 24, device="cpu"), features(90, 32, seed=1, device="cpu")
    values = []
    for device in ("cuda", "cpu"):
        leaf = student.to(device).requires_grad_()
        loss = affkd.rkd_angle_loss(leaf, teacher.to(device))
        values.append((loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()))
    assert error(*values) < 1e-5


@pytest.mark.parametrize("name", ["sp", "pkt", "rkd_distance", "cka", "irg_edge"])
@pytest.mark.parametrize("items", [64, 1024, 9000])
def test_what_auto_takes_runs_and_says_so(name: str, items: int) -> None:
    student, teacher = features(items, 64), features(items, 64, seed=1)
    spec = preset(name).spec
    plan = affkd.explain_plan(student, teacher, spec.affinity, spec.normalization, spec.loss)
    assert plan.backend != "reference", plan
    loss = preset(name)(student.requires_grad_(), teacher)
    assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()
