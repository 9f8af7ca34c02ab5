"""Dtypes of the reference: what comes back, and how far float32 is from float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import oracle
import pytest
import torch
from case_inputs import Inputs, bank, pair, seed_of
from cases import Triple, base_triples, call, valid_triples
from torch import Tensor

from affkd_kernels import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# units of the last place that the reference may lose on 12 items of length 6 or 4
FLOAT32_ULPS = 64


def loss_and_gradient(triple: Triple, inputs: Inputs) -> tuple[Tensor, Tensor]:
    inputs, (student, *_) = inputs.with_grad()
    loss = reference.affinity_loss(*inputs.features, *triple.build(), **inputs.options)
    return loss, torch.autograd.grad(loss.sum(), student)[0]


@pytest.mark.parametrize(("student", "teacher"), list(product(DTYPES, DTYPES)))
def test_the_loss_is_float32_unless_an_input_is_float64(
    student: torch.dtype, teacher: torch.dtype
) -> None:
    inputs = pair(1, 5, 4, teacher_dim=3)
    mixed = Inputs(inputs.student.to(student), inputs.teacher.to(teacher))
    loss, gradient = loss_and_gradient(base_triples()[0], mixed)
    expected = torch.float64 if torch.float64 in (student, teacher) else torch.float32
    assert loss.dtype == expected and loss.dim() == 0
    assert gradient.dtype == student and gradient.shape == inputs.student.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_keys_and_scale_have_their_dtypes(dtype: torch.dtype) -> None:
    inputs, leaves = call("scales").make(2).to(dtype).with_grad()
    inputs.options["student_scale"] = leaves[2] = torch.tensor(0.4, requires_grad=True)
    loss = reference.affinity_loss(*inputs.features, "gram", "softmax", "kl", **inputs.options)
    gradients = torch.autograd.grad(loss, leaves)
    assert [g.dtype for g in gradients] == [dtype, dtype, torch.float32]


@pytest.mark.parametrize("position", range(4))
def test_one_float64_among_the_features_is_enough(position: int) -> None:
    inputs = bank(3, 4, 3, keys=5, teacher_dim=2)
    tensors = [*inputs.features, inputs.options["student_keys"], inputs.options["teacher_keys"]]
    tensors = [x if i == position else x.float() for i, x in enumerate(tensors)]
    loss = reference.affinity_loss(*tensors[:2], student_keys=tensors[2], teacher_keys=tensors[3])
    assert loss.dtype == torch.float64


def test_row_losses_have_the_dtype_of_the_loss() -> None:
    inputs = call("self-none").make(4)
    for dtype in DTYPES:
        rows = reference.affinity_loss(*inputs.to(dtype).features, reduction="none")
        assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_lose_nothing_inside(dtype: torch.dtype) -> None:
    """A half input gives what the same numbers give as float32, bit for bit."""
    for triple in base_triples():
        half = pair(seed_of(triple), 6, 4, teacher_dim=3).to(dtype)
        loss, gradient = loss_and_gradient(triple, half)
        exact, exact_gradient = loss_and_gradient(triple, half.to(torch.float32))
        assert torch.equal(loss, exact), str(triple)
        assert torch.equal(gradient, exact_gradient.to(dtype)), str(triple)


def test_autocast_changes_nothing() -> None:
    inputs = pair(5, 6, 4).to(torch.float32)
    for triple in base_triples()[::5]:
        plain, gradient = loss_and_gradient(triple, inputs)
        graph, (student,) = inputs.with_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = reference.affinity_loss(*graph.features, *triple.build())
        # the backward of eager operations belongs outside the context, as PyTorch's guide has it
        (autocast_gradient,) = torch.autograd.grad(loss, student)
        assert torch.equal(loss, plain) and torch.equal(autocast_gradient, gradient), str(triple)


def mean_pair_loss(triple: Triple, inputs: Inputs) -> float:
    (one,) = oracle.stages(*inputs.features, *triple)
    return float(abs(one.pair_loss).mean())


def test_float32_is_close_to_float64(tally: Callable[..., None]) -> None:
    """On float32 numbers, against the same numbers in float64.

    The loss in units of its mean |l_ij|: the terms of a KL have both signs and cancel, which is its
    condition and nobody's error. The gradient in units of its largest entry.
    """
    worst = {"loss": 0.0, "gradient": 0.0}
    for triple in valid_triples():
        single = pair(seed_of(triple), 12, 6, teacher_dim=4).to(torch.float32)
        loss, gradient = loss_and_gradient(triple, single)
        exact, exact_gradient = loss_and_gradient(triple, single.to(torch.float64))
        errors = {
            "loss": (loss - exact).abs() / mean_pair_loss(triple, single),
            "gradient": (gradient - exact_gradient).abs().max() / exact_gradient.abs().max(),
        }
        for what, error in errors.items():
            ulps = error.item() / torch.finfo(torch.float32).eps
            worst[what] = max(worst[what], ulps)
        tally("triples within the float32 bounds")
    assert max(worst.values()) < FLOAT32_ULPS, worst


@pytest.mark.parametrize("affinity", ["sqeuclidean", "euclidean", "rbf(unit=False)"])
def test_a_common_offset_does_not_hurt_distances_in_float32(affinity: str) -> None:
    inputs = pair(6, 12, 6).map(lambda x: (x + 1000.0).float())
    loss = reference.affinity_loss(*inputs.features, affinity, "none", "l1")
    exact = reference.affinity_loss(*inputs.to(torch.float64).features, affinity, "none", "l1")
    # without the mean taken out, the squares of 1000 leave no digit: 1e6 * 6e-8 on distances of 1
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
