"""Centered matrices in the CUDA kernels: blocks share out the sums that others wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from case_inputs import Inputs, bank, mask, own_keys, pair, weights
from cases import Call, Part, Triple
from cuda_host import harness
from cuda_host.comparison import (
    compare,
    compare_with_eager,
    distance,
    with_kernels,
    with_reference,
)
from torch import Tensor

CENTER = Part("frobenius", (("center", True),))
TRIPLES = [
    Triple(Part(affinity, options), CENTER, Part(loss))
    for affinity, options, loss in (
        ("gram", (), "mse"),
        ("gram", (), "l1"),
        ("gram", (("clamp_min", 0.1),), "smooth_l1"),
        ("cosine", (), "l1"),
        ("rbf", (), "smooth_l1"),
        ("rbf", (("unit", False),), "mse"),
        ("euclidean", (), "smooth_l1"),
        ("polynomial", (), "l1"),
    )
]
EVERYDAY = ["gram", "rows", "product"]


def scaled(inputs: Inputs) -> Inputs:
    scale = torch.tensor(0.7, dtype=inputs.student.dtype)
    return Inputs(*inputs.features, {**inputs.options, "student_scale": scale})


CALLS = [
    Call("B70", lambda s: pair(s, 70, 5, teacher_dim=3)),
    Call("B1", lambda s: pair(s, 1, 5)),
    Call("mask", lambda s: pair(s, 70, 5, mask=mask(s, 70))),
    Call("weights", lambda s: pair(s, 37, 70, row_weight=weights(s, 37))),
    Call("none", lambda s: pair(s, 37, 5, row_weight=weights(s, 37), reduction="none")),
    Call("zero", lambda s: pair(s, 37, 5, diagonal="zero", reduction="batchmean")),
    Call("N3", lambda s: pair(s, 3, 37, 5, items="tokens", mask=mask(s, 3, 37))),
    Call("Q37-K70", lambda s: bank(s, 37, 5, keys=70, teacher_dim=3)),
    Call(
        "masks",
        lambda s: bank(
            s, 37, 5, keys=45, teacher_dim=3, mask=mask(s, 37), key_mask=mask(s + 1, 45)
        ),
    ),
    Call("own", lambda s: own_keys(bank(s, 37, 5, keys=70, teacher_dim=3, diagonal="zero"), 29)),
    Call("N2-weights", lambda s: bank(
        s, 2, 19, 5, keys=37, teacher_dim=3, items="tokens", row_weight=weights(s, 2, 19)
    )),
    Call("scale", lambda s: scaled(pair(s, 37, 5))),
    Call("scale-masks", lambda s: scaled(bank(s, 37, 5, keys=45, teacher_dim=3, mask=mask(s, 37)))),
    Call("scale-weights", lambda s: scaled(pair(s, 37, 5, row_weight=weights(s, 37)))),
]  # fmt: skip
each_call = pytest.mark.parametrize("one", CALLS, ids=str)


@each_call
def test_in_three_launches_and_in_panels(one: Call, kernels: harness.Library) -> None:
    for seed, triple in enumerate(TRIPLES):
        if one.allows(triple):
            inputs = one.make(seed)
            compare(kernels, inputs, triple, 1e-11)
            assert kernels.launches == EVERYDAY, str(triple)
            compare(kernels, inputs, triple, 1e-11, budget=1)


@each_call
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_in_float32(one: Call, precision: str, kernels: harness.Library) -> None:
    for seed, triple in enumerate(TRIPLES if precision == "ieee" else TRIPLES[1::3]):
        if one.allows(triple) and one.name != "B1":
            inputs = one.make(seed).to(torch.float32)
            compare_with_eager(kernels, inputs, triple, precision=precision)
            assert len(kernels.launches) == 3, str(triple)


@pytest.fixture
def one_at_a_time(kernels: harness.Library) -> Iterator[harness.Library]:
    kernels.limit_workers(1)
    yield kernels
    kernels.limit_workers(harness.WORKERS)


@pytest.mark.parametrize(
    "shape", [(3, 530), (530, 3), (270, 270)], ids=["one-block", "many-blocks", "square"]
)
def test_blocks_that_run_one_after_the_other_wait_for_nobody(
    shape: tuple[int, int], one_at_a_time: harness.Library
) -> None:
    """However few of them a GPU has room for, and whatever there is to share out among them."""
    inputs = bank(3, shape[0], 5, keys=shape[1], teacher_dim=3)
    compare(one_at_a_time, inputs, TRIPLES[3], 1e-11)
    assert one_at_a_time.launches == EVERYDAY


def test_who_computes_what_is_no_matter(kernels: harness.Library) -> None:
    """Neither to the last bit."""
    inputs = pair(11, 70, 24, row_weight=weights(11, 70)).to(torch.float32)
    value, (gradient,) = with_kernels(kernels, inputs, TRIPLES[3])
    for workers in (1, 3):
        kernels.limit_workers(workers)
        again, (gradient_again,) = with_kernels(kernels, inputs, TRIPLES[3])
        kernels.limit_workers(harness.WORKERS)
        assert torch.equal(value, again) and torch.equal(gradient, gradient_again)


def flat(results: tuple[Tensor, Sequence[Tensor]]) -> list[Tensor]:
    return [results[0], *results[1]]


def itself(seed: int) -> Inputs:
    return pair(seed, 37, 19, teacher_dim=23)


def keys(seed: int) -> Inputs:
    return bank(seed, 37, 19, keys=41, teacher_dim=23, key_mask=mask(seed, 41))


@pytest.mark.parametrize("budget", [2**62, 1], ids=["held", "panels"])
@pytest.mark.parametrize("offset", [3.0, 10.0, 100.0])
@pytest.mark.parametrize("make", [itself, keys])
def test_inner_products_lose_what_all_items_have_in_common(
    make: Callable[[int], Inputs], offset: float, budget: int, kernels: harness.Library
) -> None:
    """Where eager float32, which centers A, has no digit left."""
    for triple in TRIPLES[:2]:
        inputs = make(0).map(lambda x: (x + offset).to(torch.float32))
        value, gradients = with_kernels(kernels, inputs, triple, budget=budget)
        exact, exact_gradients = with_reference(inputs.to(torch.float64), triple)
        assert distance(value, exact) < 5e-6, str(triple)
        for x, y in zip(gradients, exact_gradients, strict=True):
            assert distance(x, y) < 5e-6, str(triple)


def mean_errors(kernels: harness.Library, triple: Triple, inputs: list[Inputs]) -> Tensor:
    """[2, results]: in the mean square over the inputs, of the kernels and of eager float32."""
    errors = []
    for one in inputs:
        exact = flat(with_reference(one.to(torch.float64), triple))
        found = (flat(with_kernels(kernels, one, triple)), flat(with_reference(one, triple)))
        errors.append([[distance(x, y) for x, y in zip(f, exact, strict=True)] for f in found])
    return torch.tensor(errors).square().mean(0).sqrt()


@pytest.mark.parametrize("make", [itself, keys])
@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_a_far_off_item_moves_no_other(
    factor: float, make: Callable[[int], Inputs], kernels: harness.Library
) -> None:
    """A token that collects attention is among the samples of what the others have in common."""
    inputs = [make(seed).to(torch.float32) for seed in range(6)]
    for one in inputs:
        one.options.get("student_keys", one.student)[0] *= factor
    for triple in TRIPLES[:2]:
        own, eager = mean_errors(kernels, triple, inputs)
        assert (own <= 2 * eager + 1e-6).all(), (str(triple), own, eager)


def test_a_student_that_is_almost_its_teacher(kernels: harness.Library) -> None:
    """Whose loss is what is left of sums that nearly cancel."""
    inputs = []
    for seed in range(6):
        one = pair(seed, 37, 19)
        # as a number that `distance` does not take for 0
        near = Inputs(one.teacher + 1e-3 * one.student, one.teacher, {"weight": 1e9})
        inputs.append(near.to(torch.float32))
    own, eager = mean_errors(kernels, TRIPLES[0], inputs)
    assert (own <= 2 * eager + 1e-6).all(), (own, eager)


@pytest.mark.parametrize("has_keys", [False, True], ids=["self", "bank"])
def test_a_batch_that_has_collapsed_has_no_gradient(
    has_keys: bool, kernels: harness.Library
) -> None:
    """What is left of a constant matrix is rounding, and counts as nothing."""
    inputs = (keys if has_keys else itself)(1)
    collapsed = (1000 + 100 * inputs.student[:1]).expand(37, -1)
    inputs = Inputs(collapsed, inputs.teacher, inputs.options).to(torch.float32)
    for triple in TRIPLES[:2]:
        value, gradients = with_kernels(kernels, inputs, triple)
        exact, _ = with_reference(inputs.to(torch.float64), triple)
        assert distance(value, exact) < 1e-5, str(triple)
        assert not gradients[0].any(), str(triple)
