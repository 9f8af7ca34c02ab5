"""Forward-mode derivatives: carried by the reference, refused by what cannot, never lost.

`torch.no_grad` calls off the backward alone: a dual number's tangent is still wanted under it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from case_inputs import bank, mask, pair
from torch import Tensor
from torch.autograd import forward_ad

import affkd_kernels as affkd
from affkd_kernels import ops
from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.spec import make_spec

TRIPLE = ("gram", "row_l2", "mse")
LossOf = Callable[[Tensor], Tensor]
MODES = {"grad": torch.enable_grad, "no-grad": torch.no_grad}


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    return request.param()


def assert_carried(loss_of: LossOf, x: Tensor, mode: AbstractContextManager[None]) -> None:
    """Of the tangent v, the loss's is J v, as the backward has it."""
    direction = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    value = loss_of(leaf)
    weights = torch.randn_like(value)
    (gradient,) = torch.autograd.grad((weights * value).sum(), leaf)
    with mode, forward_ad.dual_level():
        dual = loss_of(forward_ad.make_dual(x, direction))
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close((weights * tangent).sum(), (gradient * direction).sum())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_students_is_carried(
    reduction: str, masked: bool, mode: AbstractContextManager[None]
) -> None:
    student, teacher = pair(1, 12, 4, teacher_dim=6).features
    options: dict[str, Any] = {"mask": mask(1, 12)} if masked else {}
    how = {"reduction": reduction, **options}
    # of the first call without options the plan is kept, and must not be taken
    affkd.affinity_loss(student, teacher, *TRIPLE, **how)
    assert_carried(lambda x: affkd.affinity_loss(x, teacher, *TRIPLE, **how), student, mode)


def test_that_of_keys_and_scale_is_carried(mode: AbstractContextManager[None]) -> None:
    inputs = bank(2, 6, 4, keys=9, teacher_dim=3)
    options = dict(inputs.options, student_scale=torch.tensor(0.7, dtype=torch.float64))
    for name in ("student_keys", "student_scale"):

        def loss_of(x: Tensor, name: str = name) -> Tensor:
            return affkd.affinity_loss(*inputs.features, *TRIPLE, **{**options, name: x})

        assert_carried(loss_of, options[name], mode)


def test_that_of_angles_is_carried(mode: AbstractContextManager[None]) -> None:
    student, teacher = pair(3, 7, 4).features
    assert_carried(lambda x: affkd.rkd_angle_loss(x, teacher), student, mode)


def test_under_torch_func_too(mode: AbstractContextManager[None]) -> None:
    student, teacher = pair(4, 12, 4).features
    direction = torch.randn_like(student)
    for loss in (affkd.preset("sp"), affkd.RKDAngleLoss()):
        leaf = student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, teacher), leaf)
        with mode:
            _, tangent = torch.func.jvp(lambda x, f=loss: f(x, teacher), (student,), (direction,))
        torch.testing.assert_close(tangent, (gradient * direction).sum())


def test_a_teacher_is_a_constant(mode: AbstractContextManager[None]) -> None:
    student, teacher = pair(5, 12, 4).features
    with mode, forward_ad.dual_level():
        dual = forward_ad.make_dual(teacher, torch.ones_like(teacher))
        for loss in (affkd.preset("sp"), affkd.preset("sp", backend="reference")):
            assert forward_ad.unpack_dual(loss(student, dual)).tangent is None
        both = forward_ad.unpack_dual(affkd.affinity_loss(student, dual, detach_teacher=False))
    assert both.tangent is not None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backend_asked_for_by_name_refuses(
    reduction: str, masked: bool, mode: AbstractContextManager[None], fused: dict[str, str]
) -> None:
    student, teacher = pair(6, 12, 4).features
    options: dict[str, Any] = {"mask": mask(6, 12)} if masked else {}
    how = {"reduction": reduction, **options, **fused}
    with mode, forward_ad.dual_level():
        dual = forward_ad.make_dual(student, torch.ones_like(student))
        with pytest.raises(RuntimeError, match="no forward-mode derivative.*backend='reference'"):
            affkd.affinity_loss(dual, teacher, *TRIPLE, **how)
        # without a tangent the level changes nothing
        value = affkd.affinity_loss(student, teacher, *TRIPLE, **how)
    assert torch.equal(value, affkd.affinity_loss(student, teacher, *TRIPLE, **how))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_registered_ops_refuse(
    reduction: str, mode: AbstractContextManager[None], fused: dict[str, str]
) -> None:
    student, teacher = pair(7, 12, 4).features
    spec = make_spec(*TRIPLE, reduction=reduction)
    with mode, forward_ad.dual_level():
        dual = forward_ad.make_dual(student, torch.ones_like(student))
        inputs, _ = canonical_inputs(spec, dual, teacher)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            ops.call_op(spec, inputs, fused["backend"], fused["algorithm"])
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.ops.affkd_kernels.rkd_angle(*inputs[:2], None, 1.0, False)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_what_communicates_refuses(
    mode: AbstractContextManager[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is sent, so two processes need not be there."""
    from affkd_kernels.distributed import losses, shards

    for module in (losses, shards):
        monkeypatch.setattr(module, "check_group", lambda group: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    student, teacher = pair(8, 12, 4).features
    spec = make_spec(*TRIPLE)
    with mode, forward_ad.dual_level():
        dual = forward_ad.make_dual(student, torch.ones_like(student))
        calls: tuple[Callable[[], Any], ...] = (
            lambda: losses.evaluate(spec, None, (dual, teacher)),
            lambda: losses.rows_of_all_ranks(spec, None, (dual, teacher)),
            lambda: losses.mean_over_ranks(dual.sum(), 1, None),
            lambda: shards.gather_rows(dual, None),
        )
        for call in calls:
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                call()
