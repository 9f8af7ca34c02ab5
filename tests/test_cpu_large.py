"""More than 2^31 pairs, against sums that a float64 closed form gives without any pair."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.kernels import cpu

usable, reason = cpu.available()
pytestmark = [pytest.mark.skipif(not usable, reason=reason), pytest.mark.slow]


def memory_gib() -> float:
    """The memory of the machine; where that cannot be asked, enough."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError):
        return math.inf


QUERIES, KEYS = 65_600, 32_800


@pytest.fixture(autouse=True)
def _all_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def random_items() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher and their keys: one feature each, so that the pairs are all the work."""
    student, teacher = torch.randn(2, QUERIES, 1).unbind()
    student_keys, teacher_keys = torch.randn(2, KEYS, 1).unbind()
    return student.requires_grad_(), teacher, student_keys.requires_grad_(), teacher_keys


def fused(
    items: tuple[Tensor, Tensor, Tensor, Tensor], pair_mask: Tensor | None
) -> tuple[Tensor, ...]:
    """The mean of (s_i k_j - t_i l_j)^2, and its gradients."""
    student, teacher, student_keys, teacher_keys = items
    loss = affkd.affinity_loss(
        student, teacher, "gram", "none", "mse", pair_mask=pair_mask,
        student_keys=student_keys, teacher_keys=teacher_keys, backend="cpp", algorithm="tiled",
    )  # fmt: skip
    return loss.detach(), *torch.autograd.grad(loss, (student, student_keys))


def closed_form(items: tuple[Tensor, Tensor, Tensor, Tensor], widths: Tensor) -> tuple[Tensor, ...]:
    """The same in float64 where row i has the pairs with its first widths[i] keys.

    Expanding the square leaves, for each row, sums over the first keys, and for each key, sums
    over the rows that are wide enough.
    """
    s, t, k, m = (x.detach().double().flatten() for x in items)
    first = torch.stack((k * k, k * m, m * m)).cumsum(1)  # [3, K]
    kk, km, mm = torch.nn.functional.pad(first, (1, 0))[:, widths]  # [Q] each
    pairs = widths.sum()
    loss = (s * s * kk - 2 * s * t * km + t * t * mm).sum() / pairs
    # row i is wide enough for key j where widths[i] > j
    ss, st = (
        torch.bincount(widths, x, KEYS + 1)[1:].flip(0).cumsum(0).flip(0) for x in (s * s, s * t)
    )
    by_query = 2 * (s * kk - t * km) / pairs
    by_key = 2 * (k * ss - m * st) / pairs
    return loss, by_query[:, None], by_key[:, None]


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert (x.double() - y).norm() < 1e-5 * y.norm()


def test_counts_of_pairs_need_64_bits() -> None:
    assert QUERIES * KEYS > 2**31
    items = random_items()
    assert_close(fused(items, None), closed_form(items, torch.full((QUERIES,), KEYS)))


@pytest.mark.skipif(memory_gib() < 6, reason="the mask alone holds 2 GiB")
def test_addresses_of_pairs_need_64_bits() -> None:
    """The mask is the one thing that is read at [row * K + column]."""
    items = random_items()
    widths = torch.randint(KEYS + 1, (QUERIES,))
    # what a 32-bit offset would misread is not like the rest
    widths[-50:] = torch.arange(50)
    pair_mask = torch.arange(KEYS, dtype=torch.int32) < widths[:, None].int()
    assert_close(fused(items, pair_mask), closed_form(items, widths))
