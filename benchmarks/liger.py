"""The losses in the style of Liger-Kernel's fused linear losses, as an expert would port it.

Row blocks with the gradient taken in the forward, as in :mod:`benchmarks.chunked`, but the block's
loss and gradient are one compiled function (``torch.func.grad_and_value`` under ``torch.compile``),
and a block has so many rows that its matrix is about as large as the features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .chunked import Recipe, Sweep, chunked_loss


def liger_style_loss(recipe: Recipe, student: Tensor, teacher: Tensor, **options: Tensor) -> Tensor:
    """As :func:`benchmarks.chunked.chunked_loss`."""
    return chunked_loss(recipe, student, teacher, sweep=CompiledSweep, **options)


class CompiledSweep(Sweep):
    def blocks(self) -> Iterator[slice]:
        # as many blocks as the matrix is wider than the features, rounded to a power of two rows
        blocks = -(-len(self.student_keys) // self.student.shape[1])
        rows = 1 << max(-(-len(self.student) // blocks) - 1, 0).bit_length()
        return (slice(i, i + rows) for i in range(0, len(self.student), rows))

    def block_gradient(
        self, rows: slice, sums: Tensor | None, d_sums: Tensor | None
    ) -> tuple[Tensor, ...]:
        compiled = _block(self.recipe, self.self_affinity)
        gradients, objective = compiled(
            self.student[rows],
            self.student_keys,
            self.teacher[rows],
            self.teacher_keys,
            rows.start,
            self.count,
            None if sums is None else sums.detach(),
            d_sums,
        )
        return (objective, *gradients)


@functools.cache
def _block(recipe: Recipe, self_affinity: bool) -> Callable[..., tuple[tuple[Tensor, ...], Tensor]]:
    """A block's part of the objective with its gradients by its rows and, where asked, by keys."""

    def objective(
        x: Tensor,
        keys: Tensor,
        teacher: Tensor,
        teacher_keys: Tensor,
        start: int,
        count: int,
        sums: Tensor | None,
        d_sums: Tensor | None,
    ) -> Tensor:
        pair = recipe.affinity(x, keys, start), recipe.affinity(teacher, teacher_keys, start)
        value = x.new_zeros(())
        if recipe.loss is not None:
            value = recipe.loss(*pair, sums) / count
        if recipe.sums is not None and d_sums is not None:
            value = value + d_sums @ recipe.sums(*pair)
        return value

    by = (0, 1) if self_affinity else (0,)
    return torch.compile(torch.func.grad_and_value(objective, argnums=by))
