"""Published code: torchdistill's relational losses, value and gradient, and where they differ."""

from __future__ import annotations

import pytest
import torch
from case_inputs import features
from torch import Tensor

from affkd_kernels import reference

mid_level = pytest.importorskip("torchdistill.losses.mid_level")

PATHS = {"student_output_path": "s", "teacher_output_path": "t"}


def published(criterion: torch.nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    return criterion({"s": {"output": student}}, {"t": {"output": teacher}})


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    return features(seed, 8, 3, 2, 2).requires_grad_(), features(seed + 1, 8, 5, 2, 2)


def assert_agree(ours: Tensor, theirs: Tensor, student: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    gradients = (torch.autograd.grad(loss, student)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=100 * rtol, atol=1e-12)


def test_rkd_distance() -> None:
    student, teacher = inputs(1)
    criterion = mid_level.RKDLoss(dist_factor=1.0, angle_factor=0.0, reduction="mean", **PATHS)
    ours = reference.affinity_loss(student, teacher, "euclidean", "mean", "smooth_l1")
    assert_agree(ours, published(criterion, student, teacher), student)


def test_rkd_angle() -> None:
    from affkd_kernels.angle import rkd_angle_loss

    student, teacher = inputs(3)
    criterion = mid_level.RKDLoss(dist_factor=0.0, angle_factor=1.0, reduction="mean", **PATHS)
    for backend in ("auto", "reference"):
        theirs = published(criterion, student, teacher)
        assert_agree(rkd_angle_loss(student, teacher, backend=backend), theirs, student)


def test_pkt() -> None:
    # theirs adds eps = 1e-7 to the norms, which costs as many digits
    student, teacher = (x.flatten(1) for x in inputs(5))
    student = student.detach().requires_grad_()
    criterion = mid_level.PKTLoss("s", "output", "t", "output")
    theirs = criterion({"s": {"output": student}}, {"t": {"output": teacher}})
    ours = reference.affinity_loss(student, teacher, "cosine(shifted=True)", "row_sum", "kl")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    gradients = (torch.autograd.grad(loss, student)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_pkt_exactly_with_its_eps_out_of_the_way() -> None:
    student, teacher = (x.flatten(1).detach() for x in inputs(5))
    criterion = mid_level.PKTLoss("s", "output", "t", "output", eps=1e-16)
    theirs = criterion({"s": {"output": student}}, {"t": {"output": teacher}})
    ours = reference.affinity_loss(
        student, teacher, "cosine(shifted=True)", "row_sum", "kl(eps=1e-16)"
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_spkd_is_the_row_l1_variant() -> None:
    """Its `normalize(G, 1)` passes p = 1, where Tung & Mori (2019) divide rows by their L2 norm."""
    student, teacher = inputs(7)
    criterion = mid_level.SPKDLoss(reduction="batchmean", **PATHS)
    theirs = published(criterion, student, teacher)
    assert_agree(
        reference.affinity_loss(student, teacher, "gram", "row_l1", "mse"), theirs, student
    )
    row_l2 = reference.affinity_loss(student, teacher, "gram", "row_l2", "mse")
    assert (row_l2 - theirs).abs() > 0.1 * theirs
