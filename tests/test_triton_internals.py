"""What is particular about the Triton kernels, in Triton's interpreter.

That they compute the right numbers is shown by the tests that all implementations share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from case_inputs import bank, pair
from torch import Tensor

from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels import angle as angles
from affkd_kernels.kernels import triton as kernels
from affkd_kernels.kernels.result import LossAndGrad, Needs
from affkd_kernels.spec import make_spec

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if not kernels.available("cpu")[0]:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from affkd_kernels.kernels.triton import angle, configs, plan, stages, sweeps  # noqa: E402


def evaluate(inputs: Any, triple: tuple[str, str, str], algorithm: str, **options: Any) -> Any:
    keys = {k: v for k, v in inputs.options.items() if k.endswith("keys")}
    static = {k: v for k, v in inputs.options.items() if not k.endswith("keys")}
    spec = make_spec(*triple, **static, **options)
    canonical, _ = canonical_inputs(spec, *inputs.features, **keys)
    needs = Needs(student=True, student_keys=bool(keys))
    return kernels.loss_and_grad(spec, canonical, needs, algorithm)


def assert_close(ours: LossAndGrad, expected: LossAndGrad, tolerance: float) -> None:
    for x, y in zip(ours, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@triton.jit
def _log_ratio_kernel(a: Any, b: Any, out: Any, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, stages.log_ratio(tl.load(a + at), tl.load(b + at)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_logarithm_of_a_quotient_near_1_keeps_its_digits(dtype: torch.dtype) -> None:
    distances = torch.logspace(-6, 1, 256, dtype=torch.float64)
    b = torch.rand(256, dtype=torch.float64) + 0.5
    a, b = (b * (1 + distances)).to(dtype), b.to(dtype)
    out = torch.empty_like(a)
    _log_ratio_kernel[(1,)](a, b, out, COUNT=256)
    # of the numbers as rounded; a - b is exact
    exact = torch.log1p((a.double() - b.double()) / b.double())
    assert ((out.double() - exact).abs() / exact).max() < 8 * torch.finfo(dtype).eps


PANELS = [
    # bytes: V has a row of 37 or 41 numbers of 8 bytes; blocks have 32 rows
    pytest.param(lambda: pair(3, 37, 5, teacher_dim=4), 32 * 37 * 8, id="rows-of-one-matrix"),
    pytest.param(lambda: bank(4, 37, 5, keys=41, teacher_dim=4), 0, id="less-than-a-block"),
    pytest.param(
        lambda: pair(5, 3, 9, 5, items="tokens"), 2 * 9 * 9 * 8, id="some-matrices-of-several"
    ),
]


@pytest.mark.parametrize("make, limit", PANELS)
@pytest.mark.parametrize(
    "triple",
    [
        ("gram", "row_l2", "mse"),
        ("rbf", "softmax", "kl(direction='reverse')"),
        ("euclidean", "mean", "smooth_l1"),
    ],
)
def test_panels_of_any_size_give_the_same(make: Any, limit: int, triple: Any) -> None:
    whole = evaluate(make(), triple, "dense")
    assert_close(evaluate(make(), triple, "tiled", max_workspace_bytes=limit), whole, 1e-12)


class Compiled:
    """Stands for a compiled kernel, which is launched with all arguments in order."""

    launches = 0

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        assert len(grid) == 3

        def launch(*args: Any) -> None:
            Compiled.launches += 1
            self.kernel[grid](*args)

        return launch


class Jitted:
    """Stands for a kernel of the JIT, which returns what it compiled."""

    launches = 0

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **choices: Any) -> Compiled:
            Jitted.launches += 1
            self.kernel[grid](*args, **choices)
            return Compiled(self.kernel)

        return launch


@pytest.fixture
def jitted_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from affkd_kernels.kernels.triton import centering, combine, finish, gradients, prepare, product

    for module in (centering, combine, finish, gradients, prepare, product, sweeps):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Jitted(getattr(module, name)))
    Jitted.launches = Compiled.launches = 0
    plan.make_plan.cache_clear()
    yield
    plan.make_plan.cache_clear()


@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
def test_a_second_call_launches_what_the_first_compiled(
    algorithm: str, jitted_kernels: None
) -> None:
    inputs = bank(6, 18, 5, keys=7, teacher_dim=4)
    triple = ("cosine", "frobenius(center=True)", "l1")
    first = evaluate(inputs, triple, algorithm)
    launches = Jitted.launches
    assert launches > 5 and Compiled.launches == 0
    inputs.student.mul_(2.0)
    doubled = evaluate(inputs, triple, algorithm)
    assert (Jitted.launches, Compiled.launches) == (launches, launches)
    # a cosine knows no length, and its gradient halves
    assert_close(doubled._replace(grad_student=2 * doubled.grad_student), first, 1e-12)
    evaluate(pair(7, 18, 5), triple, algorithm)
    assert Jitted.launches > launches


class Assembled:
    """Stands for a compiled kernel that needs so many registers, and counts when it is loaded."""

    def __init__(self, needed: int, registers: int) -> None:
        self.needed, self.registers = needed, registers

    def _init_handles(self) -> None:
        self.n_spills = max(self.needed - self.registers, 0)


class Assembler:
    """Stands for a kernel of the JIT that is compiled without being launched."""

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def warmup(self, *args: Any, grid: Any, maxnreg: int, **choices: Any) -> Assembled:
        assert (args, grid, choices) == ((1, 2), (3,), {"HOW": 4, "num_warps": 8})
        return Assembled(self.needed, maxnreg)


@pytest.mark.parametrize("needed, registers", [(60, 64), (65, 128), (129, 168), (255, 255)])
def test_what_spills_is_compiled_with_more_registers(needed: int, registers: int) -> None:
    first = Assembled(needed, 64)
    first._init_handles()
    options = {"num_warps": 8, "maxnreg": 64}
    found = plan.without_spills(first, Assembler(needed), (3,), (1, 2), {"HOW": 4}, options)
    assert found.registers == registers


def test_what_spills_with_any_number_of_registers_stays_as_it_is() -> None:
    first = Assembled(300, 64)
    first._init_handles()
    options = {"num_warps": 8}
    assert plan.without_spills(first, Assembler(300), (3,), (1, 2), {"HOW": 4}, options) is first


def test_products_follow_the_precision_that_is_set() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert configs.dot_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "dtype, beta, masked",
    [(torch.float32, 0.1, True), (torch.float32, 0.0, False), (torch.float64, 1.0, False)],
)
def test_the_sweep_over_angles(dtype: torch.dtype, beta: float, masked: bool) -> None:
    student, teacher = torch.randn(2, 2, 33, 4, dtype=torch.float64).unbind(0)
    student[0, 1] = student[0, 0]
    mask = torch.rand(2, 33) > 0.3 if masked else None
    s, t = (angles.distances(x, mask, dtype) for x in (student, teacher))
    expected, expected_slope = angles.eager_sweep(s, t, beta, True)
    loss, slope = angle.sweep(s, t, beta, True)
    tolerance = 16 * torch.finfo(dtype).eps
    assert abs(loss - expected) < tolerance * abs(expected)
    x, y = (angles.distance_gradient(s, _present(one)) for one in (slope, expected_slope))
    assert (x - y).norm() < tolerance * y.norm()
    alone, nothing = angle.sweep(s, t, beta, False)
    assert nothing is None and torch.equal(alone, loss)


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
