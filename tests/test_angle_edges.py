"""RKD's angle loss at its edges: few, coincident, bad and masked items, layouts, autocast."""

from __future__ import annotations

import math

import pytest
import torch
from angle_inputs import each_sweep, features

from affkd_kernels.angle import rkd_angle_loss


@each_sweep
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_too_few_items_for_an_angle(count: int, backend: str) -> None:
    student, teacher = features(count, 4).requires_grad_(), features(count, 3, seed=1)
    loss = rkd_angle_loss(student, teacher, backend=backend)
    loss.backward()
    # with two items every angle is 0 or 1 by definition
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-30)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-14)


@each_sweep
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapsed_batch_has_a_finite_loss_and_no_gradient(
    backend: str, dtype: torch.dtype
) -> None:
    one = features(1, 300, dtype=dtype)
    student = one.repeat(12, 1).requires_grad_()
    loss = rkd_angle_loss(student, features(12, 3, seed=1, dtype=dtype), backend=backend)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert student.grad.eq(0).all()


@each_sweep
@pytest.mark.parametrize("length", [3, 300, 20000])
def test_coincident_items_exert_no_force_on_each_other(length: int) -> None:
    student = features(12, length, dtype=torch.float32)
    student[3:7] = student[2]
    teacher = features(12, 5, seed=1, dtype=torch.float32)
    student.requires_grad_()
    fused = rkd_angle_loss(student, teacher)
    literal = rkd_angle_loss(student.double(), teacher, backend="reference")
    torch.testing.assert_close(fused.double(), literal, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (fused, literal)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-9)


@each_sweep
def test_a_distance_that_the_gram_matrix_cannot_resolve_is_none() -> None:
    teacher = features(12, 5, seed=1)
    gradients = []
    for distance in (0.0, 1e-10):
        student = features(12, 300)
        student[6:] = student[:6] + distance * features(6, 300, seed=2)
        student.requires_grad_()
        rkd_angle_loss(student, teacher).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


@each_sweep
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_bad_values_show_unless_masked(bad: float, backend: str, count: int) -> None:
    for side in range(2):
        sides = [features(count, 4), features(count, 3, seed=1)]
        clean = [x.clone() for x in sides]
        sides[side][0, 1] = bad
        assert not rkd_angle_loss(*sides, backend=backend).isfinite()

        mask = torch.arange(count) > 0
        student = sides[0].requires_grad_()
        loss = rkd_angle_loss(student, sides[1], mask=mask, backend=backend)
        loss.backward()
        expected = rkd_angle_loss(clean[0][1:], clean[1][1:], backend=backend)
        torch.testing.assert_close(loss, expected)
        assert student.grad[0].eq(0).all() and student.grad.isfinite().all()


@each_sweep
def test_overflow_is_not_a_plausible_number() -> None:
    student = features(5, 3) * 1e200
    for backend in ("auto", "reference"):
        assert not rkd_angle_loss(student, features(5, 3, seed=1), backend=backend).isfinite()


@each_sweep
def test_everything_masked_gives_zero_with_a_graph() -> None:
    student = features(5, 3).requires_grad_()
    loss = rkd_angle_loss(student, features(5, 3), mask=torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


@each_sweep
def test_layouts_and_strides() -> None:
    maps = features(2, 4, 3, 5), features(2, 4, 3, 5, seed=1)
    by_items = {
        "samples": [x.flatten(1) for x in maps],
        "pixels": [x.flatten(2).transpose(1, 2) for x in maps],
        "channels": [x.flatten(2) for x in maps],
    }
    for items, tokens in by_items.items():
        expected = rkd_angle_loss(*tokens, items="samples" if items == "samples" else "tokens")
        student = maps[0].to(memory_format=torch.channels_last).requires_grad_()
        actual = rkd_angle_loss(student, maps[1], items=items)
        torch.testing.assert_close(actual, expected)
        (gradient,) = torch.autograd.grad(actual, student)
        (plain,) = torch.autograd.grad(
            rkd_angle_loss(student.contiguous(), maps[1], items=items, backend="reference"), student
        )
        torch.testing.assert_close(gradient, plain)
    one, teacher = features(1, 3).requires_grad_(), features(6, 3, seed=1)
    rkd_angle_loss(one.expand(6, 3) * torch.arange(6)[:, None], teacher).backward()
    assert one.grad.isfinite().all()


def test_the_teacher_is_a_constant_unless_asked() -> None:
    student, teacher = features(5, 3).requires_grad_(), features(5, 3, seed=1).requires_grad_()
    for backend in ("auto", "reference"):
        rkd_angle_loss(student, teacher, backend=backend).backward()
        assert teacher.grad is None
    rkd_angle_loss(student, teacher, detach_teacher=False).backward()
    assert teacher.grad.norm() > 0


@each_sweep
def test_autocast_does_not_round() -> None:
    student, teacher = features(9, 4, dtype=torch.float32), features(9, 4, seed=1)
    student.requires_grad_()
    for backend in ("auto", "reference"):
        plain = rkd_angle_loss(student, teacher.float(), backend=backend)
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            cast = rkd_angle_loss(student, teacher.float(), backend=backend)
        assert torch.equal(plain, cast)
        gradients = [torch.autograd.grad(loss, student)[0] for loss in (plain, cast)]
        assert torch.equal(*gradients)
