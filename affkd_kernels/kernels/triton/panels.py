"""The backward of a call: V in panels that fit a workspace, and their products with the features.

`dense` has room for all of V, over the held pairs of the student, which it replaces; `tiled` goes
over whole matrices while some fit, else over rows of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..result import LossAndGrad, Needs
from . import finish, gradients, prepare, product
from .call import FEATURES, ITEMS, Call
from .configs import INTERPRETED, PANEL_BYTES
from .items import Items, strides
from .layout import LOSS_PARTS
from .plan import blocks_of


class ProductStrides(NamedTuple):
    inner_row: int
    inner_matrix: int
    outer_row: int
    outer_matrix: int


class Panel(NamedTuple):
    """Some rows of some matrices."""

    first_matrix: int
    matrices: int
    row_start: int
    row_count: int


def panels_of(call: Call) -> Iterator[Panel]:
    plan = call.plan
    if plan.dense:
        yield Panel(0, plan.matrices, 0, plan.queries)
        return
    limit = plan.form.spec.max_workspace_bytes
    rows = (PANEL_BYTES if limit is None else limit) // (plan.keys * plan.dtype.itemsize)
    if rows >= plan.queries:
        step = rows // plan.queries
        for first in range(0, plan.matrices, step):
            yield Panel(first, min(step, plan.matrices - first), 0, plan.queries)
        return
    block = plan.gradient.shape.rows
    step = max(rows // block, 1) * block
    for matrix in range(plan.matrices):
        for start in range(0, plan.queries, step):
            yield Panel(matrix, 1, start, min(step, plan.queries - start))


def loss_and_grad(call: Call, needs: Needs) -> LossAndGrad:
    """The loss and the gradients that `needs` asks for, at least one."""
    how = call.how
    panels = list(panels_of(call))
    call.statistics()
    # losses and gradients in one sweep, unless the panels' products need a count that is not known
    counts_missing = how.counted and how.normalization == "none" and len(panels) > 1
    together = how.known_correction and not counts_missing
    totals = None
    if not together:
        _, totals = call.losses()
    elif len(panels) > 1:
        totals = call.empty(2)
        call.finish(totals, totals, False)
    if how.centered_gradient:
        call.means(gradients.gradient_means_kernel, True)
    backward = Backward(call, needs, panels[0], together)
    for panel in panels:
        backward.fill(panel)
        if totals is None:
            _, totals = call.combine_losses(backward.partials, backward.splits, False)
        backward.multiply(panel, totals)
    assert totals is not None
    loss = totals
    if together and len(panels) > 1:
        _, loss = call.combine_losses(backward.partials, backward.splits, False)
    return LossAndGrad(loss[0], *backward.finished(totals))


class Backward:
    """The gradients of a call, as panels of V are added to them."""

    def __init__(self, call: Call, needs: Needs, largest: Panel, with_losses: bool) -> None:
        self.call, self.plan, self.needs, self.with_losses = call, call.plan, needs, with_losses
        plan = self.plan
        self.looped = plan.dense or with_losses or needs.student_scale
        self.config = plan.sweep if self.looped else plan.gradient
        shape = self.config.shape
        blocks = largest.matrices * blocks_of(largest.row_count, shape.rows)
        self.splits, self.tiles = blocks_of(plan.keys, shape.columns), 1
        if self.looped:
            self.splits, self.tiles = plan.splits(blocks, self.splits)
        self.partials = call.numbers
        if self.looped:
            rows = plan.matrices * plan.queries
            self.partials = call.empty(rows, self.splits, int(LOSS_PARTS))
        if call.held is not None:
            self.slopes = call.held[0]
        else:
            self.slopes = call.empty(largest.matrices, largest.row_count, plan.keys)
        self.student = self.keys = None
        if needs.student:
            self.student = call.empty(*call.queries.student.shape)
        if needs.student_keys:
            self.keys = call.empty(*call.keys.student.shape)

    def fill(self, panel: Panel) -> None:
        """V of a panel."""
        plan, shape = self.plan, self.config.shape
        blocks = panel.matrices * blocks_of(panel.row_count, shape.rows)
        self.call.launch(
            gradients.gradients_kernel, (blocks * self.splits,), self.call.pairs, self.slopes,
            self.partials, plan.queries, plan.keys, plan.offset, self.tiles, panel.first_matrix,
            panel.row_start, panel.row_count, config=self.config, SHAPE=shape, HELD=plan.dense,
            LOSSES=self.with_losses, SCALE=self.needs.student_scale, LOOPED=self.looped,
        )  # fmt: skip

    def multiply(self, panel: Panel, totals: Tensor) -> None:
        """V with the keys, for the queries, and transposed with the queries, for the keys."""
        plan, call = self.plan, self.call
        rows, all_keys = (panel.row_start, panel.row_count), (0, plan.keys)
        if self.student is not None:
            self._product(
                self.student, call.queries, call.keys, panel, rows, all_keys, totals, False
            )
        if self.keys is not None:
            self._product(self.keys, call.keys, call.queries, panel, all_keys, rows, totals, True)

    def _product(
        self, out: Tensor, outer: Items, inner: Items, panel: Panel, outer_range: tuple[int, int],
        inner_range: tuple[int, int], totals: Tensor, transposed: bool,
    ) -> None:  # fmt: skip
        config = self.plan.key_product if transposed else self.plan.product
        shape, dim = config.shape, out.shape[2]
        if dim == 0:
            return
        blocks = panel.matrices * blocks_of(outer_range[1], shape.rows)
        self.call.launch(
            product.product_kernel, (blocks * blocks_of(dim, shape.columns),),
            self.slopes, out, inner.student, outer.student, self.call.or_dummy(inner.mask),
            self.call.or_dummy(outer.mask), self.call.scales[0], totals, outer.size, inner.size,
            panel.first_matrix, *outer_range, *inner_range, dim,
            ProductStrides(*strides(inner.student), *strides(outer.student)),
            config=config, SHAPE=shape, TRANSPOSED=transposed, MASKED=inner.mask is not None,
            OUTER_MASKED=outer.mask is not None, ADD=transposed and panel.row_start > 0,
            SPLIT=inner.student.dtype == torch.bfloat16 and not INTERPRETED,
        )  # fmt: skip

    def finished(self, totals: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of student, student_keys and student_scale."""
        for items, gradient in ((self.call.queries, self.student), (self.call.keys, self.keys)):
            if self.call.how.unit and gradient is not None:
                self._through_unit_length(items, gradient)
            if self.call.how.centered_product and gradient is not None:
                self.call.through_centering(items, gradient)
        return self.student, self.keys, self._scale_gradient(totals)

    def _through_unit_length(self, items: Items, gradient: Tensor) -> None:
        x = items.student
        self.call.launch(
            prepare.unit_length_kernel, (self.plan.matrices * blocks_of(items.size, ITEMS),),
            x, self.call.or_dummy(items.mask), items.terms, gradient, items.size, x.shape[2],
            *strides(x), MASKED=items.mask is not None, ITEMS=ITEMS, FEATURES=FEATURES,
        )  # fmt: skip

    def _scale_gradient(self, totals: Tensor) -> Tensor | None:
        if not self.needs.student_scale:
            return None
        gradient = self.call.empty(1)
        parts = self.partials.shape[0] * self.splits
        self.call.launch(
            finish.scale_gradient_kernel, (1,), self.partials, totals, gradient, parts, ROWS=1024
        )
        return gradient[0]
