"""What is particular about the Triton kernels, in Triton's interpreter.

That they compute the right numbers is shown by the tests that all implementations share.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from case_inputs import bank, mask, pair
from torch import Tensor
from triton_calls import assert_close, evaluate, tl, triton

from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels import angle as angles
from affkd_kernels.kernels.result import Needs
from affkd_kernels.kernels.triton import angle, choices, configs, launch, plan, stages
from affkd_kernels.spec import make_spec


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


class Assembled:
    """Stands for a compiled kernel that needs so many registers, and counts when it is loaded."""

    def __init__(self, needed: int, registers: int) -> None:
        self.needed, self.registers = needed, registers

    def _init_handles(self) -> None:
        self.n_spills = max(self.needed - self.registers, 0)


class Assembler:
    """Stands for a kernel of the JIT that is compiled without being launched.

    One stage saves 20 registers; of twice the threads each needs a third, and has 128.
    """

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def warmup(
        self,
        *args: Any,
        grid: Any,
        num_warps: int,
        num_stages: int = 3,
        maxnreg: int = 64,
        **choices: Any,
    ) -> Assembled:
        assert (args, grid, choices) == ((1, 2), (3,), {"HOW": 4})
        if num_stages == 1:
            return Assembled(self.needed - 20, 255)
        if num_warps == 16:
            return Assembled(self.needed // 3, 128)
        return Assembled(self.needed, maxnreg)


@pytest.mark.parametrize("needed, registers", [(60, 64), (65, 128), (129, 168), (255, 255)])
def test_what_spills_is_compiled_with_more_registers(needed: int, registers: int) -> None:
    options = {"num_warps": 8, "maxnreg": 64}
    found = plan.compile_kernel(Assembler(needed), (3,), (1, 2), {"HOW": 4}, options)
    assert found.registers == registers and not found.n_spills


@pytest.mark.parametrize("needed, left", [(270, 250), (300, 100)])
def test_what_spills_with_all_registers_is_compiled_to_need_fewer(needed: int, left: int) -> None:
    found = plan.compile_kernel(Assembler(needed), (3,), (1, 2), {"HOW": 4}, {"num_warps": 8})
    assert found.needed == left and not found.n_spills


def test_what_spills_in_any_case_stays_as_it_is() -> None:
    found = plan.compile_kernel(Assembler(600), (3,), (1, 2), {"HOW": 4}, {"num_warps": 8})
    assert found.registers == 64 and found.n_spills


def test_a_plan_holds_no_tensor() -> None:
    """It may be evicted: a captured graph of a call would go on reading what it held."""
    held = vars(plan_of(("rbf", "softmax(tau=0.1)", "kl"))).values()
    assert not [x for x in held if isinstance(x, Tensor)]


def plan_of(triple: tuple[str, str, str]) -> plan.Plan:
    spec = make_spec(*triple)
    inputs, _ = canonical_inputs(spec, *pair(9, 6, 4).features)
    return plan.Plan(plan.Form.of(spec, inputs, Needs(student=True), "dense", 1.0))


SHAPED_FOR_GPUS = [
    pytest.param(lambda: pair(11, 70, 40, teacher_dim=33), ("euclidean", "mean", "smooth_l1")),
    pytest.param(
        lambda: pair(12, 2, 40, 19, items="tokens", mask=mask(3, 2, 40)), ("cosine", "row_l1", "l1")
    ),
    pytest.param(lambda: bank(13, 35, 19, keys=600, teacher_dim=3), ("rbf", "frobenius", "mse")),
    pytest.param(
        lambda: bank(14, 3, 5, keys=1100, teacher_dim=3), ("gram", "softmax", "kl"), id="many-keys"
    ),
    pytest.param(lambda: bank(15, 33, 5, keys=260, teacher_dim=3), ("sqeuclidean", "max", "mse")),
    pytest.param(
        lambda: pair(16, 35, 19, teacher_dim=3), ("gram", "frobenius(center=True)", "smooth_l1")
    ),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("make, triple", SHAPED_FOR_GPUS)
def test_tiles_have_the_shapes_of_gpus(
    make: Any, triple: Any, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the interpreter are fewer and larger."""
    expected = evaluate(make(), triple, "dense")
    monkeypatch.setattr(configs, "architecture", lambda device: (capability, 132))
    assert_close(evaluate(make(), triple, "dense"), expected, 1e-12)


def test_triton_tells_kernels_apart_by_all_that_decides_their_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its cache on disk is older than this package's next version, whose stages may differ."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    how = plan_of(("gram", "row_l2", "mse")).how

    def key(value: Any) -> str:
        function = JITFunction(_log_ratio_kernel.fn)
        function.hash = "of the source"
        return ASTSource(function, {"COUNT": "constexpr"}, {"COUNT": value}).hash()

    before = key(how)
    properties = [name for name, x in vars(choices.Choices).items() if isinstance(x, property)]
    assert len(properties) > 10
    for name in properties:
        with monkeypatch.context() as patch:
            patch.setattr(choices.Choices, name, property(lambda _: "other"))
            assert key(how) != before, name
    assert key(how) == before
    for field in dataclasses.fields(how):
        other: dict[str, Any] = {field.name: "other"}
        assert key(dataclasses.replace(how, **other)) != before, field.name


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


def test_the_kernel_goes_to_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    @contextlib.contextmanager
    def entering(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", entering)
    for device in ("cpu", "cuda:0", "cuda:1"):
        with plan.on_device(torch.device(device)):
            pass
    assert entered == [torch.device("cuda:1")]


def test_the_sweep_over_angles_and_every_loss_choose_their_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[torch.device] = []

    @contextlib.contextmanager
    def recorded(device: torch.device) -> Iterator[None]:
        asked.append(device)
        yield
        asked.append(device)

    for module in (angle, launch):
        monkeypatch.setattr(module, "on_device", recorded)
    side = angles.distances(torch.randn(1, 3, 2), None, torch.float32)
    angle.sweep(side, side, 1.0, False)
    assert asked == [torch.device("cpu")] * 2
    evaluate(pair(10, 4, 2), ("gram", "none", "mse"), "dense")
    assert len(asked) == 4


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
