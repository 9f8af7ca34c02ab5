"""One call, launch by launch, up to the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...inputs import Inputs
from . import centering, combine, finish, prepare, sweeps
from .configs import Config
from .layout import (
    COLUMN_TERMS,
    ITEM_TERMS,
    LOSS_PARTS,
    MATRIX_TERMS,
    MEAN_PARTS,
    ROW_TERMS,
    STATISTIC_PARTS,
    Pairs,
    Side,
)
from .plan import Plan, blocks_of, compile_kernel

# items a program prepares, features at a time, and rows that a combining program takes
ITEMS, FEATURES, ROWS = 16, 64, 128
# programs among which the sum of the items is divided, and items that one should have at least
SUM_PARTS, SUM_ITEMS = 32, 128
# parts of one matrix up to which a single program combines them and finishes the loss too
SINGLE_PROGRAM = 1 << 14


# of rows: addresses inside a tile are 32-bit
MAX_STRIDE = 1 << 24


class ItemStrides(NamedTuple):
    """Of the features [N, items, D] of student and teacher."""

    student_row: int
    student_matrix: int
    student_dim: int
    teacher_row: int
    teacher_matrix: int
    teacher_dim: int


class Items(NamedTuple):
    """Queries or keys of both sides."""

    student: Tensor  # [N, items, Ds]
    teacher: Tensor  # [N, items, Dt]
    mask: Tensor | None  # [N, items]
    terms: Tensor  # [N * items, ITEM_TERMS]

    @property
    def size(self) -> int:
        return self.student.shape[1]


class Sums(NamedTuple):
    """Sums [N, parts, D + 1] of the items of both sides."""

    student: Tensor
    teacher: Tensor
    parts: int


class Call:
    """The tensors of one call and the steps that compute its loss."""

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self.plan, self.how = plan, plan.how
        self.launched: list[Any] = []
        self.pair_mask = _contiguous(inputs.pair_mask)
        self.row_weight = inputs.row_weight
        if self.row_weight is not None:
            self.row_weight = self.row_weight.detach().to(plan.dtype).contiguous()
        self.numbers = torch.empty(len(plan.numbers), dtype=torch.float64, device=plan.form.device)
        scales = (inputs.student_scale, inputs.teacher_scale)
        self.scales = tuple(
            self.numbers[i] if given is None else given.detach() for i, given in enumerate(scales)
        )
        n, q, k = plan.matrices, plan.queries, plan.keys
        self.row_terms = plan.empty(n * q, int(ROW_TERMS))
        self.matrix_terms = plan.empty(n, int(MATRIX_TERMS))
        self.column_terms = plan.empty(n * k, int(COLUMN_TERMS)) if self.how.centered else None
        self.queries = self._items(inputs.student, inputs.teacher, inputs.mask)
        self.keys = self.queries
        if inputs.student_keys is not None and inputs.teacher_keys is not None:
            self.keys = self._items(inputs.student_keys, inputs.teacher_keys, inputs.key_mask)
        self._prepare()
        self.values: tuple[Tensor, Tensor] | None = None
        if plan.dense:
            self.values = (plan.empty(n, q, k), plan.empty(n, q, k))
        self.pairs = self._pairs()
        if plan.dense:
            shape = plan.tiles.shape
            self.launch(
                sweeps.values_kernel,
                (n * blocks_of(q, shape.rows) * blocks_of(k, shape.columns),),
                self.pairs, q, k, plan.offset, config=plan.tiles, SHAPE=shape,
            )  # fmt: skip

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        config: Config | None = None,
        **constants: Any,
    ) -> None:
        """Launch a kernel; `constants` in the order of its signature, after HOW."""
        constants = {"HOW": self.how, **constants}
        known = self.plan.compiled
        if known:
            # the form of the call determines all that the JIT would look at
            compiled = known[len(self.launched)]
        else:
            options = self.plan.small_options if config is None else config.options
            compiled = compile_kernel(kernel, grid, args, constants, options)
        if compiled is None:
            kernel[grid](*args, **constants)
        else:
            compiled[(*grid, 1, 1)[:3]](*args, *constants.values())
        self.launched.append(compiled)

    def finished(self) -> None:
        """Keeps the compiled kernels for the next call; the interpreter has none."""
        if None not in self.launched:
            self.plan.compiled = tuple(self.launched)

    def sweep(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launch a kernel that goes over tiles of pairs."""
        config = self.plan.sweep
        self.launch(kernel, grid, *args, config=config, SHAPE=config.shape, **constants)

    def or_dummy(self, x: Tensor | None) -> Tensor:
        """A pointer for what the call lacks, which no kernel reads."""
        return self.numbers if x is None else x

    def _items(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Items:
        n, count = student.shape[:2]
        terms = self.plan.empty(n * count, int(ITEM_TERMS))
        return Items(_rows(student), _rows(teacher), _contiguous(mask), terms)

    def _prepare(self) -> None:
        sums = Sums(self.numbers, self.numbers, 1)
        if self.how.copied:
            sums = self.sums(self.keys)
        key_sums = sums
        if self.how.centered_features and not self.plan.self_affinity:
            sums = self.sums(self.queries)
        queries = self._prepared(self.queries, sums, key_sums)
        if not self.plan.self_affinity:
            self.keys = self._prepared(self.keys, key_sums, sums)
        else:
            self.keys = queries
        self.queries = queries

    def sums(self, items: Items, sides: int = 2) -> Sums:
        """Of both sides, or of the student's alone."""
        plan = self.plan
        parts = max(1, min(SUM_PARTS, items.size // SUM_ITEMS))
        dims = (items.student.shape[2], items.teacher.shape[2])
        student, teacher = (
            torch.empty(
                (plan.matrices, parts, dim + 1), dtype=torch.float64, device=plan.form.device
            )
            for dim in dims
        )
        chunks = blocks_of(max(*dims, 1), FEATURES)
        self.launch(
            prepare.sum_kernel, (plan.matrices * parts * chunks, sides), items.student,
            items.teacher, self.or_dummy(items.mask), student, teacher, _item_strides(items), parts,
            chunks, items.size, MASKED=items.mask is not None, ITEMS=ITEMS, FEATURES=FEATURES,
        )  # fmt: skip
        return Sums(student, teacher, parts)

    def _prepared(self, items: Items, sums: Sums, other_sums: Sums) -> Items:
        """Fills the terms of the items; their features may come back as centered copies."""
        copies = (items.student, items.teacher)
        if self.how.copied:
            copies = (self.plan.empty(*copies[0].shape), self.plan.empty(*copies[1].shape))
        self.launch(
            prepare.prepare_kernel, (self.plan.matrices * blocks_of(items.size, ITEMS), 2),
            items.student, items.teacher, self.or_dummy(items.mask), copies, sums[:2],
            other_sums[:2], items.terms, self.matrix_terms, self.numbers, _item_strides(items),
            sums.parts, other_sums.parts, items.size, *self.plan.numbers,
            MASKED=items.mask is not None, ITEMS=ITEMS, FEATURES=FEATURES,
        )  # fmt: skip
        return items._replace(student=copies[0], teacher=copies[1])

    def _pairs(self) -> Pairs:
        queries, keys = self.queries, self.keys
        student_values, teacher_values = self.values or (None, None)
        return Pairs(
            student=_side(queries.student, keys.student, self.scales[0]),
            teacher=_side(queries.teacher, keys.teacher, self.scales[1]),
            numbers=self.numbers,
            query_mask=self.or_dummy(queries.mask),
            key_mask=self.or_dummy(keys.mask),
            pair_mask=self.or_dummy(self.pair_mask),
            row_weight=self.or_dummy(self.row_weight),
            query_terms=queries.terms,
            key_terms=keys.terms,
            row_terms=self.row_terms,
            column_terms=self.or_dummy(self.column_terms),
            student_values=self.or_dummy(student_values),
            teacher_values=self.or_dummy(teacher_values),
        )

    def _row_sweep(self, kernel: Any, parts: int, **constants: Any) -> tuple[Tensor, int]:
        """The partial sums of a sweep over all rows, and into how many splits."""
        plan, shape = self.plan, self.plan.sweep.shape
        blocks = plan.matrices * blocks_of(plan.queries, shape.rows)
        splits, tiles = plan.splits(blocks, blocks_of(plan.keys, shape.columns))
        partials = plan.empty(plan.matrices * plan.queries, splits, parts)
        self.sweep(
            kernel, (blocks * splits,), self.pairs, partials, plan.queries, plan.keys, plan.offset,
            tiles, HELD=plan.dense, **constants,
        )  # fmt: skip
        return partials, splits

    def means(self, kernel: Any, gradient: bool) -> None:
        """What centering subtracts from A, or from d loss / dA."""
        plan, shape = self.plan, self.plan.sweep.shape
        rows, row_splits = self._row_sweep(kernel, int(MEAN_PARTS), COLUMNS=False)
        columns, column_splits = rows, row_splits
        if not plan.self_affinity:
            blocks = plan.matrices * blocks_of(plan.keys, shape.columns)
            column_splits, tiles = plan.splits(blocks, blocks_of(plan.queries, shape.rows))
            columns = plan.empty(plan.matrices * plan.keys, column_splits, int(MEAN_PARTS))
            self.sweep(
                kernel, (blocks * column_splits,), self.pairs, columns, plan.queries, plan.keys,
                plan.offset, tiles, HELD=plan.dense, COLUMNS=True,
            )  # fmt: skip
        self.launch(
            centering.combine_means_kernel, (plan.matrices,), self.pairs, rows, columns,
            self.matrix_terms, plan.queries, plan.keys, row_splits, column_splits,
            GRADIENT=gradient, ROWS=ROWS,
        )  # fmt: skip

    def statistics(self) -> None:
        """What normalizes the rows, and c where it is closed."""
        if self.how.normalization == "none":
            return
        if self.how.centered:
            self.means(sweeps.means_kernel, False)
        plan = self.plan
        partials, splits = self._row_sweep(sweeps.statistics_kernel, int(STATISTIC_PARTS))
        programs = 1 if self.how.whole else blocks_of(plan.queries, ROWS)
        self.launch(
            combine.combine_statistics_kernel, (plan.matrices * programs,), self.pairs, partials,
            self.matrix_terms, plan.queries, plan.keys, splits, ROWS=ROWS,
        )  # fmt: skip

    def losses(self) -> tuple[Tensor, Tensor]:
        """The row losses [N, Q], and what `combine_losses` returns."""
        partials, splits = self._row_sweep(sweeps.losses_kernel, int(LOSS_PARTS))
        return self.combine_losses(partials, splits, not self.how.known_correction)

    def combine_losses(
        self, partials: Tensor, splits: int, corrections: bool
    ) -> tuple[Tensor, Tensor]:
        """The row losses [N, Q], and [2] the loss and weight / count."""
        plan = self.plan
        single = plan.matrices == 1 and plan.queries * splits <= SINGLE_PROGRAM
        whole = single or self.how.whole
        row_losses = plan.empty(plan.matrices, plan.queries)
        totals = plan.empty(2)
        programs = 1 if whole else blocks_of(plan.queries, ROWS)
        self.launch(
            finish.combine_losses_kernel, (plan.matrices * programs,), self.pairs, partials,
            self.matrix_terms, row_losses, totals, plan.queries, plan.keys, splits,
            CORRECTIONS=corrections, REDUCTION=plan.reduction if single else "none",
            WHOLE=whole, ROWS=ROWS,
        )  # fmt: skip
        if not single:
            self.finish(row_losses, totals, True)
        return row_losses, totals

    def finish(self, row_losses: Tensor, totals: Tensor, loss: bool) -> None:
        plan = self.plan
        self.launch(
            finish.finish_kernel, (1,), self.pairs, row_losses, totals,
            plan.matrices * plan.queries, plan.keys, plan.matrices,
            REDUCTION=plan.reduction, LOSS=loss, ROWS=1024,
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """Features whose last dimension is contiguous, as the kernels read them."""
    x = x.detach()
    readable = x.stride(2) == 1 or x.shape[2] == 1
    return x if readable and x.stride(1) < MAX_STRIDE else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def strides(x: Tensor) -> tuple[int, int]:
    """Of rows and of matrices; of a single matrix 0, which compiles nothing anew."""
    return x.stride(1), x.stride(0) if x.shape[0] > 1 else 0


def _side(queries: Tensor, keys: Tensor, scale: Tensor) -> Side:
    return Side(queries, keys, scale, *strides(queries), *strides(keys), queries.shape[2])


def _item_strides(items: Items) -> ItemStrides:
    x, y = items.student, items.teacher
    return ItemStrides(*strides(x), x.shape[2], *strides(y), y.shape[2])
