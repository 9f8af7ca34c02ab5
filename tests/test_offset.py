"""Features far from the origin, as those behind a ReLU are: as exact as eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from case_inputs import Inputs, bank, mask, pair
from interpreter import interpreted
from torch import Tensor

import affkd_kernels as affkd

Triple = tuple[str, str, str]
SEEDS = range(3)
# one of each kind of statistic, and of affinity that sees the origin
SEEING = (
    ("gram", "row_l2", "mse"),
    ("polynomial", "row_l2", "mse"),
    ("gram", "frobenius", "mse"),
    ("gram", "row_l1", "smooth_l1"),
    ("polynomial(degree=3)", "mean", "mse"),
    ("gram", "max", "mse"),
)
CENTERED = (
    ("gram", "frobenius(center=True)", "mse"),
    ("gram", "frobenius(center=True)", "l1"),
    ("gram(scale=0.5)", "frobenius(center=True)", "smooth_l1(beta=0.1)"),
)


def itself(seed: int) -> Inputs:
    return pair(seed, 37, 19, teacher_dim=23)


def keys(seed: int) -> Inputs:
    return bank(seed, 37, 19, keys=41, teacher_dim=23, key_mask=mask(seed, 41))


def results(inputs: Inputs, triple: Triple, **how: str) -> list[Tensor]:
    """The loss and the gradients of the student's features."""
    inputs, leaves = inputs.with_grad()
    loss = affkd.affinity_loss(*inputs.features, *triple, **inputs.options, **how)
    return [loss.detach().double(), *(x.double() for x in torch.autograd.grad(loss, leaves))]


def squared_errors(values: list[Tensor], exact: list[Tensor]) -> Tensor:
    pairs = zip(values, exact, strict=True)
    return torch.stack([((x - y).norm() / y.norm()).square() for x, y in pairs])


def check(
    make: Callable[[int], Inputs], offset: float, triple: Triple, fused: dict[str, str]
) -> None:
    """At most twice the error of eager float32, plus 1e-6: the rounding of few sums is chance, and
    the error that of several seeds."""
    ours = eager = torch.zeros(())
    for seed in SEEDS:
        inputs = make(seed).map(lambda x: (x + offset).to(torch.float32))
        exact = results(inputs.to(torch.float64), triple, backend="reference")
        ours = ours + squared_errors(results(inputs, triple, **fused), exact)
        eager = eager + squared_errors(results(inputs, triple, backend="reference"), exact)
    ours, eager = ((x / len(SEEDS)).sqrt() for x in (ours, eager))
    assert (ours <= 2 * eager + 1e-6).all(), (triple, ours.tolist(), eager.tolist())


def takes_few(fused: dict[str, str]) -> bool:
    """The factored form exists for few triples, and the interpreter has time for few."""
    return fused["algorithm"] == "factored" or interpreted(fused)


@pytest.mark.parametrize("make", [itself, keys])
@pytest.mark.parametrize("offset", [10.0, 100.0])
def test_an_affinity_that_sees_the_offset(
    offset: float, make: Callable[[int], Inputs], fused: dict[str, str]
) -> None:
    """P and T nearly agree, and what flows back is small beside the sums that it is made of."""
    for triple in SEEING[:1] if takes_few(fused) else SEEING:
        check(make, offset, triple, fused)


@pytest.mark.parametrize("make", [itself, keys])
@pytest.mark.parametrize("offset", [3.0, 100.0])
def test_centering_takes_the_offset_out(
    offset: float, make: Callable[[int], Inputs], fused: dict[str, str]
) -> None:
    """Of inner products it is done on the features: nothing is left of the offset but 1e-5 of it,
    where the reference, which centers A, has no digit left."""
    for triple in CENTERED[:1] if fused["algorithm"] == "factored" else CENTERED:
        inputs = make(0).map(lambda x: (x + offset).to(torch.float32))
        exact = results(inputs.to(torch.float64), triple, backend="reference")
        errors = squared_errors(results(inputs, triple, **fused), exact).sqrt()
        assert (errors < 5e-6).all(), (triple, errors.tolist())
