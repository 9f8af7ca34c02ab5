"""RKD's angle loss, fused and reference, against the triple loop."""

from __future__ import annotations

import differences
import oracle
import pytest
import torch
from case_inputs import mask, pair
from edges import edge, edges_with_outcome

from affkd_kernels.angle import rkd_angle_loss

BACKENDS = ("auto", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (3, 1), (6, 4), (4, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_value_and_gradient(backend: str, shape: tuple[int, ...], beta: float) -> None:
    inputs = pair(1, *shape)
    student = inputs.student.clone().requires_grad_()
    loss = rkd_angle_loss(student, inputs.teacher, beta=beta, backend=backend)
    expected = oracle.angle_loss(*inputs.features, beta=beta)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-14)
    gradient = differences.numerical_gradient(
        lambda x: oracle.angle_loss(x, inputs.teacher, beta=beta), inputs.student
    )
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], torch.from_numpy(gradient), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask(backend: str) -> None:
    inputs = pair(2, 7, 4, teacher_dim=3, mask=mask(2, 7))
    loss = rkd_angle_loss(*inputs.features, **inputs.options, backend=backend)
    expected = oracle.angle_loss(*inputs.features, **inputs.options)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["coincident", "collapsed-student", "collapsed-both", "all-zero"])
def test_coincident_rows(backend: str, name: str) -> None:
    inputs, (student,) = edge(name).make(3).with_grad()
    loss = rkd_angle_loss(student, inputs.teacher, backend=backend)
    expected = oracle.angle_loss(student, inputs.teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    if name != "coincident":
        assert (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "one",
    [one for one in edges_with_outcome("nonfinite") if "student_keys" not in one.make(0).options],
    ids=str,
)
def test_inf_and_nan_show(backend: str, one: object) -> None:
    assert not rkd_angle_loss(*one.make(4).features, backend=backend).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    inputs, (student,) = edge("no-rows").make(5).with_grad()
    loss = rkd_angle_loss(student, inputs.teacher, backend=backend)
    loss.backward()
    assert loss == 0 and student.grad.shape == student.shape


def test_a_right_angle_against_a_straight_one() -> None:
    # vertices at the middle item: psi is 0 for the student and -1 for the teacher, twice; at an
    # end, the student's 45 degrees against the teacher's 0: 1 - sqrt 1/2, twice at each end
    student = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[1.0], [0.0], [-1.0]])
    expected = (2 * 0.5 * 1**2 + 4 * 0.5 * (1 - 0.5**0.5) ** 2) / 27
    for backend in BACKENDS:
        loss = rkd_angle_loss(student, teacher, backend=backend)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
