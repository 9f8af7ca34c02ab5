"""Derivatives of the reference in float64, for every valid triple.

Central differences are right only where the loss is smooth, so inputs are drawn until the nearest
kink (|A| of row_l1 and mean(positive), a clamp, a second maximum, |s - t| of l1 and smooth_l1) is
`CLEARANCE` away, a thousand steps of gradcheck and a hundred of the oracle's differences.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import differences
import pytest
import torch
from case_inputs import Inputs, bank, pair, seed_of
from cases import Call, Triple, base_triples, call, valid_triples
from torch import Tensor

from affkd_kernels import reference

CLEARANCE = 1e-3
SELF = Call("self", lambda seed: pair(seed, 4, 3, teacher_dim=2))
CROSS = Call("cross", lambda seed: bank(seed, 3, 3, keys=4, teacher_dim=2))
TINY = Call("tiny", lambda seed: pair(seed, 3, 2))
DETACHED = ("max", (("detach", True),))


def is_detached(triple: Triple) -> bool:
    """A statistic that autograd holds constant, and differences of the loss do not."""
    return triple.normalization == DETACHED


def smooth_inputs(triple: Triple, shape: Call) -> Inputs:
    for seed in count(seed_of(triple, shape)):
        inputs = shape.make(seed)
        if differences.distance_to_kink(*inputs.features, *triple, **inputs.options) > CLEARANCE:
            return inputs
    raise AssertionError("unreachable")


def loss_of_leaves(triple: Triple, inputs: Inputs) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The loss as a function of student, student_keys and student_scale, whichever there are."""
    components = triple.build()
    names = ["student", *(n for n in ("student_keys", "student_scale") if n in inputs.options)]

    def function(*leaves: Tensor) -> Tensor:
        named = dict(zip(names, leaves, strict=True))
        options = {**inputs.options, **named}
        student = options.pop("student")
        return reference.affinity_loss(student, inputs.teacher, *components, **options)

    return function, inputs.with_grad()[1]


@pytest.mark.parametrize("triple", [t for t in valid_triples() if not is_detached(t)], ids=str)
def test_gradcheck(triple: Triple, tally: Callable[..., None]) -> None:
    for shape in (SELF, CROSS):
        function, leaves = loss_of_leaves(triple, smooth_inputs(triple, shape))
        assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)
    tally("triples gradchecked, self-affinity and cross-affinity")


@pytest.mark.parametrize("triple", [t for t in valid_triples() if is_detached(t)], ids=str)
def test_gradient_with_a_detached_statistic(triple: Triple, tally: Callable[..., None]) -> None:
    for shape in (SELF, CROSS):
        assert_gradient_agrees(triple, smooth_inputs(triple, shape))
    tally("triples checked against differences at a constant statistic")


def assert_gradient_agrees(triple: Triple, inputs: Inputs) -> None:
    function, leaves = loss_of_leaves(triple, inputs)
    (gradient,) = torch.autograd.grad(function(*leaves).sum(), leaves[:1])
    expected = differences.student_gradient(*inputs.features, *triple, **inputs.options)
    torch.testing.assert_close(gradient, torch.from_numpy(expected), rtol=1e-6, atol=1e-8)


CALLS_WITH_GRADIENTS = (
    "self-none",
    "padded-matrixmean-exclude",
    "row-weight-mask-batchmean",
    "pixels-matrixmean",
    "channels-batchmean",
    "cross-masks-batchmean",
    "gathered-keep",
    "diagonal-zero",
    "pair-mask",
    "scales",
)


@pytest.mark.parametrize("name", CALLS_WITH_GRADIENTS)
def test_gradient_of_calls_against_the_oracle(name: str, tally: Callable[..., None]) -> None:
    triples = [triple for triple in base_triples() if call(name).allows(triple)]
    if name.startswith("gathered"):
        # a row's pair with a gathered key ties with its mirror image and moves alone
        triples = [triple for triple in triples if triple.normalization.name != "max"]
    for triple in triples[seed_of(name) % 5 :: 5]:
        assert_gradient_agrees(triple, smooth_inputs(triple, call(name)))
        tally("gradients of calls compared with the oracle's differences")


@pytest.mark.parametrize("triple", base_triples(), ids=str)
def test_second_derivative(triple: Triple, tally: Callable[..., None]) -> None:
    function, leaves = loss_of_leaves(triple, smooth_inputs(triple, TINY))
    assert torch.autograd.gradgradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)
    tally("bare triples gradgradchecked")


@pytest.mark.parametrize("affinity", ["gram", "cosine", "sqeuclidean", "rbf"])
def test_gradient_of_both_sides(affinity: str) -> None:
    """`detach_teacher=False`: the teacher is an input like the student."""
    inputs = pair(seed_of(affinity), 4, 3, teacher_dim=2)
    leaves = [x.clone().requires_grad_() for x in inputs.features]

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        return reference.affinity_loss(student, teacher, affinity, "row_l2", detach_teacher=False)

    assert torch.autograd.gradcheck(function, leaves)


def test_the_teacher_is_a_constant() -> None:
    inputs = pair(1, 4, 3)
    student, teacher = (x.clone().requires_grad_() for x in inputs.features)
    reference.affinity_loss(student, teacher, "gram", "row_l2").backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_the_student_scale_gets_a_gradient_and_the_teacher_scale_none() -> None:
    inputs, leaves = call("scales").make(1).with_grad()
    teacher_scale = inputs.options["teacher_scale"].requires_grad_()
    reference.affinity_loss(*inputs.features, "gram", "softmax", "kl", **inputs.options).backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert teacher_scale.grad is None


def test_tied_maxima_share_the_gradient_evenly() -> None:
    # A = 2 1 | 2 1 and L = sum A / max A = 3; of dL/d max = - 6/4 each of the two maxima gets half:
    # dL/dA = -1/4 1/2 | -1/4 1/2, and dL/dx_i = 2 * -1/4 + 1 * 1/2 = 0
    student = torch.ones(2, 1, requires_grad=True)
    keys = torch.tensor([[2.0], [1.0]], requires_grad=True)
    nothing = {"student_keys": keys, "teacher_keys": torch.zeros(2, 1)}
    loss = reference.affinity_loss(
        student, torch.zeros(2, 1), "gram", "max", "l1", reduction="sum", **nothing
    )
    loss.backward()
    assert loss == 3.0
    assert student.grad.tolist() == [[0.0], [0.0]]
    assert keys.grad.tolist() == [[-0.5], [1.0]]


def test_keys_that_hold_the_rows_add_up_to_the_self_affinity() -> None:
    """A self-affinity's gradient reaches the features through both sides."""
    inputs = pair(3, 5, 4)
    alone = inputs.student.clone().requires_grad_()
    reference.affinity_loss(alone, inputs.teacher, "cosine", "row_l2").backward()
    rows, keys = (inputs.student.clone().requires_grad_() for _ in range(2))
    reference.affinity_loss(
        rows, inputs.teacher, "cosine", "row_l2", student_keys=keys, teacher_keys=inputs.teacher
    ).backward()
    torch.testing.assert_close(rows.grad + keys.grad, alone.grad, rtol=1e-10, atol=1e-14)
