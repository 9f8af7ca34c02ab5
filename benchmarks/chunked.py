"""The losses as an expert writes them without kernels: row blocks, the gradient in the forward.

A :class:`Recipe` says what a block of rows adds to the loss. :func:`chunked_loss` sweeps over the
blocks, so that no B x B matrix is ever held; autograd works inside a block.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# entries of one block's matrix: 2 MB in float32; half and four times as much are as fast
BLOCK_ELEMENTS = 1 << 19


class Recipe(NamedTuple):
    """A loss over pairs, cut into row blocks.

    Attributes:
        prepare: features [B, D] -> the rows that pairs are made of; O(B D), differentiable.
        affinity: rows [R, D], keys [K, D], the first row's index -> A [R, K].
        loss: A_s, A_t, the sums of all blocks -> what the block adds to the loss.
        sums: A_s, A_t -> the block's part of the statistics [k], which add up over the blocks.
        total: the sums of all blocks -> the loss, where they determine it.
        count: rows, keys -> what the blocks' losses are divided by.
    """

    prepare: Callable[[Tensor], Tensor]
    affinity: Callable[[Tensor, Tensor, int], Tensor]
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    sums: Callable[[Tensor, Tensor], Tensor] | None = None
    total: Callable[[Tensor], Tensor] | None = None
    count: Callable[..., int] = operator.mul


def chunked_loss(
    recipe: Recipe,
    student: Tensor,
    teacher: Tensor,
    *,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    sweep: type[Sweep] | None = None,
) -> Tensor:
    """The loss of student [B, Ds] against teacher [B, Dt]; keys [K, D] get no gradient."""
    x = recipe.prepare(student.flatten(1))
    with torch.no_grad():
        y = recipe.prepare(teacher.flatten(1))
    return _Chunked.apply(sweep or Sweep, recipe, x, y, student_keys, teacher_keys)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        make_sweep: type[Sweep],
        recipe: Recipe,
        student: Tensor,
        teacher: Tensor,
        student_keys: Tensor | None,
        teacher_keys: Tensor | None,
    ) -> Tensor:
        sweep = make_sweep(recipe, student.detach(), teacher, student_keys, teacher_keys)
        if recipe.sums is None:
            loss, gradient = sweep.gradient()
        else:
            sums = sweep.sums(recipe.sums)
            closed = recipe.total is not None
            loss, d_sums = sweep.closed_total(sums) if closed else sweep.loss(sums)
            _, gradient = sweep.gradient(sums, d_sums)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * grad_loss, None, None, None


class Sweep:
    """The sweeps over the row blocks of one call."""

    def __init__(
        self,
        recipe: Recipe,
        student: Tensor,
        teacher: Tensor,
        student_keys: Tensor | None,
        teacher_keys: Tensor | None,
    ) -> None:
        self.recipe = recipe
        self.student, self.teacher = student, teacher
        self.self_affinity = student_keys is None
        self.student_keys = student if student_keys is None else student_keys
        self.teacher_keys = teacher if teacher_keys is None else teacher_keys
        self.count = recipe.count(len(student), len(self.student_keys))

    def blocks(self) -> Iterator[slice]:
        rows = max(1, BLOCK_ELEMENTS // len(self.student_keys))
        return (slice(i, i + rows) for i in range(0, len(self.student), rows))

    def affinities(self, rows: slice, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        affinity = self.recipe.affinity
        with torch.no_grad():
            teacher = affinity(self.teacher[rows], self.teacher_keys, rows.start)
        return affinity(x, keys, rows.start), teacher

    def sums(self, of_block: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The statistics, no gradient."""
        parts = [
            of_block(*self.affinities(rows, self.student[rows], self.student_keys))
            for rows in self.blocks()
        ]
        return torch.stack(parts).sum(0)

    def closed_total(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its derivative by the sums, where they determine it."""
        assert self.recipe.total is not None
        with torch.enable_grad():
            leaf = sums.requires_grad_()
            loss = self.recipe.total(leaf)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def loss(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its derivative by the sums, from a sweep without the features' gradient."""
        assert self.recipe.loss is not None
        total, d_sums = torch.zeros_like(sums[0]), torch.zeros_like(sums)
        for rows in self.blocks():
            pair = self.affinities(rows, self.student[rows], self.student_keys)
            with torch.enable_grad():
                leaf = sums.detach().requires_grad_()
                part = self.recipe.loss(*pair, leaf) / self.count
                d_sums += torch.autograd.grad(part, leaf)[0]
            total += part.detach()
        return total, d_sums

    def gradient(
        self, sums: Tensor | None = None, d_sums: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum of what the blocks add, and the gradient of the loss by the student's rows."""
        total = self.student.new_zeros(())
        gradient = torch.zeros_like(self.student)
        for rows in self.blocks():
            part, d_rows, *d_keys = self.block_gradient(rows, sums, d_sums)
            total += part
            gradient[rows] += d_rows
            if d_keys:
                gradient += d_keys[0]
        return total, gradient

    @torch.enable_grad()
    def block_gradient(
        self, rows: slice, sums: Tensor | None, d_sums: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What a block adds, and its gradient by its rows and, of a self-affinity, by all rows."""
        x = self.student[rows].detach().requires_grad_()
        keys = self.student_keys.detach().requires_grad_(self.self_affinity)
        pair = self.affinities(rows, x, keys)
        objective = x.new_zeros(())
        if self.recipe.loss is not None:
            constant = None if sums is None else sums.detach()
            objective = self.recipe.loss(*pair, constant) / self.count
        if self.recipe.sums is not None and d_sums is not None:
            objective = objective + d_sums @ self.recipe.sums(*pair)
        by = (x, keys) if self.self_affinity else (x,)
        return (objective.detach(), *torch.autograd.grad(objective, by))


def _flat(x: Tensor) -> Tensor:
    return x


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x)


def _centered(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _gram(rows: Tensor, keys: Tensor, start: int) -> Tensor:
    return rows @ keys.T


def _shifted_cosine(rows: Tensor, keys: Tensor, start: int) -> Tensor:
    return (rows @ keys.T + 1) / 2


def _taylor_rbf(rows: Tensor, keys: Tensor, start: int) -> Tensor:
    g = 0.8 * (rows @ keys.T)
    return math.exp(-0.8) * (1 + g + g.square() / 2)


def _rbf_of_unit(rows: Tensor, keys: Tensor, start: int) -> Tensor:
    squares = rows.square().sum(1, keepdim=True) + keys.square().sum(1)
    return (-0.4 * (squares - 2 * rows @ keys.T).clamp(min=0)).exp()


def _distances(rows: Tensor, keys: Tensor, start: int) -> Tensor:
    squares = rows.square().sum(1, keepdim=True) + keys.square().sum(1)
    own = torch.arange(start, start + len(rows), device=rows.device).unsqueeze(1)
    diagonal = own == torch.arange(len(keys), device=rows.device)
    root = (squares - 2 * rows @ keys.T).clamp(min=1e-12).sqrt()
    return root.masked_fill(diagonal, 0)


def _frobenius_sums(a_s: Tensor, a_t: Tensor) -> Tensor:
    return torch.stack([a_s.square().sum(), a_t.square().sum(), (a_s * a_t).sum()])


def _frobenius_loss(sums: Tensor) -> Tensor:
    return 2 - 2 * sums[2] / (sums[0] * sums[1]).sqrt()


def _mean_sums(a_s: Tensor, a_t: Tensor) -> Tensor:
    counts = ((a > 0).sum().to(a.dtype) for a in (a_s, a_t))
    return torch.stack([a_s.sum(), a_t.sum(), *counts])


def _mean_smooth_l1(a_s: Tensor, a_t: Tensor, sums: Tensor | None) -> Tensor:
    assert sums is not None
    s, t = a_s * (sums[2] / sums[0]), a_t * (sums[3] / sums[1])
    return F.smooth_l1_loss(s, t, reduction="sum")


def _row_l2_mse(a_s: Tensor, a_t: Tensor, sums: Tensor | None) -> Tensor:
    return (F.normalize(a_s) - F.normalize(a_t)).square().sum()


def _row_sum_kl(a_s: Tensor, a_t: Tensor, sums: Tensor | None) -> Tensor:
    s, t = a_s / a_s.sum(1, keepdim=True), a_t / a_t.sum(1, keepdim=True)
    return (t * ((t + 1e-7) / (s + 1e-7)).log()).sum()


def _mse(a_s: Tensor, a_t: Tensor, sums: Tensor | None) -> Tensor:
    return (a_s - a_t).square().sum()


def _softmax_kl(a_s: Tensor, a_t: Tensor, sums: Tensor | None) -> Tensor:
    log_s, p_t = (a_s / 0.04).log_softmax(1), (a_t / 0.04).softmax(1)
    return F.kl_div(log_s, p_t, reduction="sum")


RECIPES: dict[str, Recipe] = {
    "sp": Recipe(_flat, _gram, _row_l2_mse),
    "pkt": Recipe(_unit, _shifted_cosine, _row_sum_kl),
    "rkd_distance": Recipe(_flat, _distances, _mean_smooth_l1, _mean_sums),
    "cc": Recipe(_unit, _taylor_rbf, _mse),
    "gram_anchor": Recipe(_unit, _gram, _mse),
    "sp_frobenius": Recipe(_flat, _gram, sums=_frobenius_sums, total=_frobenius_loss),
    "rbf_frobenius": Recipe(_unit, _rbf_of_unit, sums=_frobenius_sums, total=_frobenius_loss),
    "cka": Recipe(
        _centered, _gram, sums=_frobenius_sums, total=lambda sums: _frobenius_loss(sums) / 2
    ),
    "compress": Recipe(_unit, _gram, _softmax_kl, count=lambda rows, keys: rows),
}
