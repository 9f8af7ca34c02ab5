"""What the tests of RKD's angle loss share."""

from __future__ import annotations

import pytest
import torch

from affkd_kernels.angle import rkd_angle_loss

DEVICE = torch.get_default_device()
MASK = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)
# a test that takes the fixture's value names it as an argument instead
each_sweep = pytest.mark.usefixtures("sweep")


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def loss_and_gradient(student: torch.Tensor, teacher: torch.Tensor, **options) -> list:
    student = student.detach().requires_grad_()
    loss = rkd_angle_loss(student, teacher, **options)
    return [loss.detach(), *torch.autograd.grad(loss, student)]
