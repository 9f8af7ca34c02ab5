"""How exact the C++ kernels are where a formula is delicate: kinks, guesses, sums that cancel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from case_inputs import Inputs, bank, pair
from cases import Triple, part
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.kernels import cpu

usable, reason = cpu.available()
pytestmark = pytest.mark.skipif(not usable, reason=reason)
each_algorithm = pytest.mark.parametrize("algorithm", ["dense", "tiled"])


def evaluate(inputs: Inputs, triple: Triple, **how: Any) -> list[Tensor]:
    """The loss and the gradients of all leaves."""
    inputs, leaves = inputs.with_grad()
    loss = affkd.affinity_loss(*inputs.features, *triple.build(), **inputs.options, **how)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_is_the_reference(inputs: Inputs, triple: Triple, algorithm: str) -> None:
    expected = evaluate(inputs, triple, backend="reference")
    actual = evaluate(inputs, triple, backend="cpp", algorithm=algorithm)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-13)


@each_algorithm
@pytest.mark.parametrize("beta", [0.0, 1e-30, 1e-12, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_maximum_over_itself_is_one(dtype: torch.dtype, beta: float, algorithm: str) -> None:
    """What rounding made of the quotient, a narrow smooth L1 would take for a difference."""
    student, teacher = (x.to(dtype) for x in pair(1, 20, 30, teacher_dim=17).features)
    # all other affinities are 0
    student[1:], teacher[1:] = 0, 0
    triple = Triple(part("gram"), part("max", detach=True), part("smooth_l1", beta=beta))
    loss, gradient = evaluate(Inputs(student, teacher), triple, backend="cpp", algorithm=algorithm)
    assert loss == 0 and not gradient.any()


@each_algorithm
@pytest.mark.parametrize("beta, dtype", [(1e-40, torch.float32), (1e-310, torch.float64)], ids=str)
def test_a_smooth_l1_whose_beta_has_no_reciprocal_is_l1(
    beta: float, dtype: torch.dtype, algorithm: str
) -> None:
    inputs = pair(2, 20, 6).to(dtype)
    # rows in which s = t, where infinity times 0 would be NaN
    inputs.teacher[:5] = inputs.student[:5]

    def of(name: str, **options: float) -> list[Tensor]:
        triple = Triple(part("gram"), part("none"), part(name, **options))
        return evaluate(inputs, triple, backend="cpp", algorithm=algorithm)

    torch.testing.assert_close(of("smooth_l1", beta=beta), of("l1"))


def test_one_pair_beyond_beta_repeats_the_sweep() -> None:
    """`tiled` guesses that all differences lie within beta, and must notice that one does not."""
    inputs = pair(3, 200, 6, teacher_dim=4)
    sides = (affkd.affinity_matrix(x, "euclidean", "mean") for x in inputs.features)
    differences = (next(sides) - next(sides)).abs().triu().flatten().sort(descending=True).values
    beta = float(differences[:2].mean())
    assert (differences > beta).sum() == 1
    triple = Triple(part("euclidean"), part("mean"), part("smooth_l1", beta=beta))
    assert_is_the_reference(inputs, triple, "tiled")


@each_algorithm
def test_what_pkt_corrects_afterwards_reaches_the_keys(algorithm: str) -> None:
    """The correction grows with eps, which as published would hide an error of it."""
    inputs = bank(4, 150, 12, keys=210, teacher_dim=9)
    triple = Triple(part("cosine", shifted=True), part("row_sum"), part("kl", eps=0.1))
    assert_is_the_reference(inputs, triple, algorithm)


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@each_algorithm
@pytest.mark.parametrize("preset, rows, dim", [("irg_edge", 128, 512), ("sp", 64, 25088)])
def test_float32_error_at_published_sizes(preset: str, rows: int, dim: int, algorithm: str) -> None:
    """At most twice the error of eager float32, plus 1e-6, in loss and gradient."""
    # of the features as float32 has them
    features = [x.float().double() for x in pair(5, rows, dim).features]

    def of(dtype: torch.dtype, **how: str) -> tuple[Tensor, Tensor]:
        student = features[0].to(dtype).requires_grad_()
        loss = affkd.preset(preset, **how)(student, features[1].to(dtype))
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    exact = of(torch.float64, backend="reference")
    eager = of(torch.float32, backend="reference")
    fused = of(torch.float32, backend="cpp", algorithm=algorithm)
    for one, other, true in zip(fused, eager, exact, strict=True):
        assert error(one, true) <= 2 * error(other, true) + 1e-6
