"""A feature is freed with its last name, whatever the loss has computed from it.

Reference counting alone must do: until the garbage collector runs, a cycle would keep the feature
and all that its graph has saved, a training step's activations. Changed in place by its own loss,
a feature is upstream of the loss's node and downstream of it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from case_inputs import mask, pair
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels import ops
from affkd_kernels.dispatch import make_plan
from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.spec import make_spec

TRIPLE = ("gram", "row_l2", "mse")
LossOf = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def is_freed(loss_of: LossOf, backward: bool) -> bool:
    """Whether a feature is, that its own loss was added to."""
    leaf, teacher = pair(17, 12, 4).features
    feature = leaf.requires_grad_() * 1.0
    loss = loss_of(feature, teacher).sum()
    if backward:
        loss.backward(retain_graph=True)
    feature.add_(loss)
    freed = weakref.ref(feature)
    del feature, loss
    return freed() is None


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_by_an_affinity_loss(
    reduction: str, masked: bool, backward: bool, fused: dict[str, str]
) -> None:
    options: dict[str, Any] = {"mask": mask(17, 12)} if masked else {}
    how = {"reduction": reduction, **options, **fused}
    assert is_freed(lambda s, t: affkd.affinity_loss(s, t, *TRIPLE, **how), backward)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_by_the_registered_op(reduction: str, backward: bool, fused: dict[str, str]) -> None:
    spec = make_spec(*TRIPLE, reduction=reduction, **fused)

    def loss_of(student: Tensor, teacher: Tensor) -> Tensor:
        inputs, _ = canonical_inputs(spec, student, teacher)
        return ops.call_op(spec, inputs, *make_plan(spec, inputs)[:2])

    assert is_freed(loss_of, backward)


@pytest.mark.parametrize("backward", [False, True])
def test_by_the_angle_loss(backward: bool) -> None:
    # of an op's first call torch itself keeps the frames, in a cycle
    affkd.rkd_angle_loss(*pair(0, 3, 2).features)
    assert is_freed(affkd.rkd_angle_loss, backward)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
@pytest.mark.parametrize("backward", [False, True])
def test_by_moments_of_all_ranks(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from affkd_kernels.distributed import factored
    from affkd_kernels.distributed.collectives import Shards

    # of a single rank, whose sums are those of all
    monkeypatch.setattr(factored, "all_reduce", lambda x, group: x)
    spec = make_spec(*TRIPLE)

    def loss_of(student: Tensor, teacher: Tensor) -> Tensor:
        inputs, _ = canonical_inputs(spec, student, teacher)
        return factored.loss(spec, inputs, Shards(None, 0, (12,)))

    assert is_freed(loss_of, backward)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_change_in_place_is_found_where_values_are_needed(
    reduction: str, fused: dict[str, str]
) -> None:
    leaf, teacher = pair(18, 12, 4).features
    feature = leaf.requires_grad_() * 1.0
    loss = affkd.affinity_loss(feature, teacher, *TRIPLE, reduction=reduction, **fused).sum()
    (expected,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    feature.mul_(2.0)
    if reduction == "none":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf)
    else:
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_last_backward_scales_the_gradient_where_it_lies(
    masked: bool, fused: dict[str, str]
) -> None:
    student, teacher = pair(17, 12, 4).features
    student.requires_grad_()
    options: dict[str, Any] = {"mask": mask(17, 12)} if masked else {}
    places: list[int] = []

    def remember(saved: Tensor) -> Tensor:
        places.append(saved.data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda saved: saved):
        loss = affkd.affinity_loss(student, teacher, *TRIPLE, **options, **fused)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, student, torch.full_like(loss, 2), retain_graph=True)
    (last,) = torch.autograd.grad(loss, student, torch.full_like(loss, 3))
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(last, 3 * once)
    assert once.data_ptr() not in places
    assert last.data_ptr() in places
