"""An everyday batch in three launches: its pairs, whole rows of them, and one product.

  gram       the arguments of all pairs of both sides, and what the items tell on the way
  rows       statistics, losses and W, which takes the place of the pairs
  multiply   V with the features, one launch for queries and one for keys; the loss
A maximum, and a centered Gram matrix, have their items prepared before; the gradient of the second
loses its mean after, but for mse. A loss without a gradient has a small kernel in place of the
product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..result import LossAndGrad, Needs
from . import multiply, rows
from .call import Call
from .configs import INTERPRETED
from .layout import STASH_PARTS
from .plan import blocks_of

# parts that are added up at a time
LANES = 1024


class Stash:
    """The tensors of a call whose pairs are held, from those to its gradients."""

    def __init__(self, call: Call, needs: Needs) -> None:
        plan = call.plan
        self.call, self.plan, self.needs = call, plan, needs
        self.slopes = any(needs)
        assert call.held is not None
        # a row of the teacher is nobody else's; of directions, a product needs the cosines
        student, self.first = call.held
        self.second = student
        if self.slopes and plan.how.matrix_correction and plan.how.unit:
            self.second = call.empty(*student.shape)
        self.of_matrix = blocks_of(plan.queries, plan.sweep.shape.rows)
        self.partials = call.empty(
            int(STASH_PARTS), plan.matrices * self.of_matrix, dtype=torch.float64
        )
        self.loss = call.empty()
        self.scale = call.empty() if needs.student_scale else self.loss

    def sweep_rows(self, row_losses: Tensor | None) -> None:
        plan, call = self.plan, self.call
        call.sweep(
            rows.rows_kernel, (plan.matrices * self.of_matrix,), call.pairs, call.states,
            call.poison, call.matrix_terms, self.first, self.second, self.partials,
            call.or_dummy(row_losses), plan.queries, plan.keys, plan.offset,
            blocks_of(plan.keys, plan.sweep.shape.columns), call.states_count, call.poison_count,
            PREPARED=plan.prepared, SLOPES=self.slopes, SCALE=self.needs.student_scale,
            ROW_LOSSES=row_losses is not None, LANES=LANES,
        )  # fmt: skip

    def multiply(self, transposed: bool, finishes: bool) -> Tensor:
        plan, call = self.plan, self.call
        config = plan.key_product if transposed else plan.product
        outer, inner = (call.keys, call.queries) if transposed else (call.queries, call.keys)
        gradient = call.empty(*outer.student.shape)
        shape = config.shape
        blocks = plan.matrices * blocks_of(outer.size, shape.rows)
        call.launch(
            multiply.multiply_kernel, (blocks * blocks_of(plan.student_dim, shape.columns),),
            call.pairs, self.first, self.second, self.partials, gradient, self.loss, self.scale,
            plan.matrices, plan.queries, plan.keys, self.of_matrix,
            config=config, SHAPE=shape, TRANSPOSED=transposed, MOVED=plan.moved,
            SPLIT=self._splits(inner.student), REDUCTION=plan.reduction, FINISHES=finishes,
            SCALE=self.needs.student_scale, LANES=LANES,
        )  # fmt: skip
        if plan.how.centered_product:
            call.through_centering(outer, gradient)
        return gradient

    def _splits(self, features: Tensor) -> bool:
        return features.dtype == torch.bfloat16 and not self.plan.moved and not INTERPRETED

    def finish(self) -> None:
        plan, call = self.plan, self.call
        call.launch(
            multiply.finish_stash_kernel, (1,), call.pairs, self.partials, self.loss, self.scale,
            plan.matrices, plan.queries, plan.keys, plan.matrices * self.of_matrix,
            REDUCTION=plan.reduction, SCALE=self.needs.student_scale, LANES=LANES,
        )  # fmt: skip


def loss_and_grad(call: Call, needs: Needs) -> LossAndGrad:
    """The loss and the gradients that `needs` asks for, which may be none."""
    stash = Stash(call, needs)
    stash.sweep_rows(None)
    gradients: list[Tensor | None] = [None, None]
    unfinished = True
    for which, wanted in enumerate((needs.student, needs.student_keys)):
        if wanted and call.plan.student_dim:
            gradients[which] = stash.multiply(which == 1, unfinished)
            unfinished = False
        elif wanted:
            items = (call.queries, call.keys)[which]
            gradients[which] = call.empty(*items.student.shape)
    if unfinished:
        stash.finish()
    scale = stash.scale if needs.student_scale else None
    return LossAndGrad(stash.loss, gradients[0], gradients[1], scale)


def row_losses(call: Call) -> Tensor:
    """The weighted row losses [N, Q]."""
    result = call.empty(call.plan.matrices, call.plan.queries)
    Stash(call, Needs(student=False)).sweep_rows(result)
    return result
