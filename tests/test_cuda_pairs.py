"""Pairs of the CUDA kernels where rounding tells: far from 0, equal items, a single feature."""

from __future__ import annotations

import pytest
import torch
from case_inputs import Inputs, bank, mask, pair
from cases import Part, Triple
from cuda_host import harness
from cuda_host.comparison import compare, compare_with_eager, distance, with_kernels, with_reference


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("budget", [2**62, 1], ids=["held", "panels"])
@pytest.mark.parametrize("keys", [False, True], ids=["self", "bank"])
def test_a_softmax_of_inner_products_far_from_the_origin(
    keys: bool, budget: int, precision: str, kernels: harness.Library
) -> None:
    """It does not see what the pairs of a row have in common, and is as exact as at the origin."""
    near = (
        bank(23, 70, 33, keys=45, teacher_dim=20) if keys else pair(23, 70, 33, mask=mask(23, 70))
    )
    far = near.map(lambda x: (x + 100).to(torch.float32))
    triple = Triple(Part("gram"), Part("softmax", (("tau", 20.0),)), Part("kl"))
    value, gradients = with_kernels(kernels, far, triple, precision=precision, budget=budget)
    exact, exact_gradients = with_reference(far.to(torch.float64), triple)
    eager, eager_gradients = with_reference(far, triple)
    # which eager float32 is not
    assert distance(value, exact) < min(2e-6, distance(eager, exact) / 4)
    for x, y, z in zip(gradients, exact_gradients, eager_gradients, strict=True):
        assert distance(x, y) <= 2 * distance(z, y) + 1e-6


def test_a_far_off_item_moves_no_other(kernels: harness.Library) -> None:
    """A token that collects attention is among the samples of the origin."""
    inputs = pair(27, 70, 33).to(torch.float32)
    inputs.student[0] *= 1000
    triple = Triple(Part("gram", (("student_scale", 0.5),)), Part("softmax"), Part("kl"))
    compare_with_eager(kernels, inputs, triple, allowed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["sqeuclidean", "euclidean"])
def test_equal_pairs_share_the_maximum(
    name: str, dtype: torch.dtype, kernels: harness.Library
) -> None:
    """Whichever tiles they lie in."""
    copied = pair(3, 40, 37).to(dtype).map(lambda x: x.repeat(2, 1))
    triple = Triple(Part(name), Part("max"), Part("mse"))
    compare(kernels, copied, triple, 1e-6 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("alternate", [False, True], ids=["halves", "alternate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "part", [Part("rbf", (("unit", False), ("gamma", 0.01))), Part("euclidean")], ids=str
)
def test_pairs_of_opposite_items_share_the_maximum(
    part: Part, dtype: torch.dtype, alternate: bool, kernels: harness.Library
) -> None:
    """Two items are as far apart as their opposites: of a kernel the largest entry."""
    near = pair(3, 20, 37).to(dtype).map(torch.Tensor.abs)
    both = near.map(lambda x: torch.stack([x, -x], int(alternate)).flatten(0, 1))
    triple = Triple(part, Part("max"), Part("mse"))
    inputs = Inputs(both.student, both.teacher, {"diagonal": "exclude"})
    compare(kernels, inputs, triple, 1e-6 if dtype == torch.float32 else 1e-11)


def test_equal_items_are_at_distance_zero(kernels: harness.Library) -> None:
    """Where rounding put them a little apart, they would count as positive entries."""
    x = pair(3, 40, 37).student.float().repeat(2, 1)
    triple = Triple(Part("sqeuclidean"), Part("mean"), Part("mse"))
    value, _ = with_kernels(kernels, Inputs(x, torch.zeros(80, 3)), triple)
    squared = (x.double().unsqueeze(0) - x.double().unsqueeze(1)).square().sum(-1)
    assert (squared == 0).sum() == 2 * 80
    expected = squared.square().mean() / squared[squared > 0].mean().square()
    assert distance(value, expected) < 1e-6


def test_of_one_feature_only_the_sign_is_left(kernels: harness.Library) -> None:
    """A cosine of almost -1, shifted, would be a positive entry."""
    inputs = pair(5, 40, 1).to(torch.float32)
    triple = Triple(Part("cosine", (("shifted", True),)), Part("mean"), Part("smooth_l1"))
    value, (gradient,) = with_kernels(kernels, inputs, triple)
    assert distance(value, with_reference(inputs.to(torch.float64), triple)[0]) < 1e-6
    assert not gradient.any()
