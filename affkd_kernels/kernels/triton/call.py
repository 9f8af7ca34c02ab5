"""One call, launch by launch, up to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...inputs import Inputs
from . import centering, combine, finish, grams, prepare, sweeps
from .arguments import Launch
from .configs import Config
from .items import Items, Sums, item_strides, readable, same_place, side_of
from .layout import (
    COLUMN_TERMS,
    ITEM_TERMS,
    LOSS_PARTS,
    MATRIX_TERMS,
    MEAN_PARTS,
    ROW_TERMS,
    STATISTIC_PARTS,
    Pairs,
)
from .plan import Plan, blocks_of, compile_kernel
from .replay import Replay

# items a program prepares, features at a time, and rows that a combining program takes
ITEMS, FEATURES, ROWS = 16, 64, 128
# programs among which the sum of the items is divided, and items that one should have at least
SUM_PARTS, SUM_ITEMS = 32, 128
# parts of one matrix up to which a single program combines them and finishes the loss too
SINGLE_PROGRAM = 1 << 14


class Call:
    """The tensors of one call and the steps that compute its loss."""

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self.plan, self.how = plan, plan.how
        self.given, self.inputs = inputs, readable(inputs, plan.dtype)
        # what a replay starts from; the interpreter compiles nothing
        self.allocated: list[Tensor] = []
        self.launched: list[Launch] = []
        self.interpreted = False
        inputs = self.inputs
        self.numbers = self.empty(len(plan.numbers), dtype=torch.float64)
        scales = (inputs.student_scale, inputs.teacher_scale)
        self.scaled = tuple(given is not None for given in scales)
        self.scales = tuple(
            self.numbers[i] if given is None else given for i, given in enumerate(scales)
        )
        n, q, k = plan.matrices, plan.queries, plan.keys
        self.row_terms = self.numbers if plan.stashed else self.empty(n * q, int(ROW_TERMS))
        self.matrix_terms = self.empty(n, int(MATRIX_TERMS))
        self.column_terms = self.empty(n * k, int(COLUMN_TERMS)) if self.how.centered else None
        self.queries = self._items(inputs.student, inputs.teacher, inputs.mask)
        self.keys = self.queries
        if inputs.student_keys is not None and inputs.teacher_keys is not None:
            self.keys = self._items(inputs.student_keys, inputs.teacher_keys, inputs.key_mask)
        if plan.prepared:
            self._prepare()
        self.held: tuple[Tensor, Tensor] | None = None
        if plan.dense:
            self.held = (self.empty(n, q, k), self.empty(n, q, k))
        self.pairs = self._pairs()
        self.states = self.poison = self.numbers
        self.states_count = self.poison_count = 0
        if plan.dense:
            self._hold_pairs()

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
        options = self.plan.small_options if config is None else config.options
        compiled = compile_kernel(kernel, grid, args, constants, options)
        if compiled is None:
            self.interpreted = True
            kernel[grid](*args, **constants)
        else:
            whole_grid, arguments = (*grid, 1, 1)[:3], (*args, *constants.values())
            compiled[whole_grid](*arguments)
            self.launched.append(Launch(compiled, whole_grid, arguments))

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In the dtype of the computation, if not another."""
        x = torch.empty(shape, dtype=dtype or self.plan.dtype, device=self.plan.form.device)
        self.allocated.append(x)
        return x

    def finished(self, *results: Tensor | None) -> None:
        """Keeps what the next call of the same form needs."""
        if not self.interpreted:
            copied = not all(map(same_place, self.given, self.inputs))
            copied_to = self.plan.dtype if copied else None
            self.plan.replay = Replay(
                self.inputs, self.allocated, self.launched, results, copied_to
            )

    def sweep(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launch a kernel that goes over tiles of pairs."""
        config = self.plan.sweep
        self.launch(kernel, grid, *args, config=config, SHAPE=config.shape, **constants)

    def or_dummy(self, x: Tensor | None) -> Tensor:
        """A pointer for what the call lacks, which no kernel reads."""
        return self.numbers if x is None else x

    def _items(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Items:
        n, count = student.shape[:2]
        terms = self.empty(n * count, int(ITEM_TERMS))
        return Items(student, teacher, mask, terms)

    def _prepare(self) -> None:
        sums = Sums(self.numbers, self.numbers, 1)
        if self.plan.copied:
            sums = self._sums(self.keys)
        key_sums = sums
        if self.how.centered_features and not self.plan.self_affinity:
            sums = self._sums(self.queries)
        queries = self._prepared(self.queries, sums, key_sums)
        if not self.plan.self_affinity:
            self.keys = self._prepared(self.keys, key_sums, sums)
        else:
            self.keys = queries
        self.queries = queries

    def _sums(self, items: Items, sides: int = 2) -> Sums:
        """Of both sides, or of the student's alone."""
        plan = self.plan
        parts = max(1, min(SUM_PARTS, items.size // SUM_ITEMS))
        dims = (items.student.shape[2], items.teacher.shape[2])
        student, teacher = (
            self.empty(plan.matrices, parts, dim + 1, dtype=torch.float64) for dim in dims
        )
        chunks = blocks_of(max(*dims, 1), FEATURES)
        self.launch(
            prepare.sum_kernel, (plan.matrices * parts * chunks, sides), items.student,
            items.teacher, self.or_dummy(items.mask), student, teacher, item_strides(items), parts,
            chunks, items.size, MASKED=items.mask is not None, ITEMS=ITEMS, FEATURES=FEATURES,
        )  # fmt: skip
        return Sums(student, teacher, parts)

    def _prepared(self, items: Items, sums: Sums, other_sums: Sums) -> Items:
        """Fills the terms of the items; their features may come back as centered copies."""
        copies = (items.student, items.teacher)
        if self.plan.copied:
            copies = (self.empty(*copies[0].shape), self.empty(*copies[1].shape))
        self.launch(
            prepare.prepare_kernel, (self.plan.matrices * blocks_of(items.size, ITEMS), 2),
            items.student, items.teacher, self.or_dummy(items.mask), copies, sums[:2],
            other_sums[:2], items.terms, self.matrix_terms, self.numbers, item_strides(items),
            sums.parts, other_sums.parts, items.size, *self.plan.numbers,
            MASKED=items.mask is not None, ITEMS=ITEMS, FEATURES=FEATURES,
        )  # fmt: skip
        return items._replace(student=copies[0], teacher=copies[1])

    def through_centering(self, items: Items, gradient: Tensor) -> None:
        """The student's gradient, so far that of items less their mean, in place."""
        sums = self._sums(items._replace(student=gradient, teacher=gradient), 1)
        self.launch(
            prepare.center_kernel, (self.plan.matrices * blocks_of(items.size, ITEMS),), gradient,
            self.or_dummy(items.mask), sums.student, sums.parts, items.size, gradient.shape[2],
            MASKED=items.mask is not None, ITEMS=ITEMS, FEATURES=FEATURES,
        )  # fmt: skip

    def _pairs(self) -> Pairs:
        queries, keys = self.queries, self.keys
        student_held, teacher_held = self.held or (None, None)
        return Pairs(
            student=side_of(queries.student, keys.student, self.scales[0]),
            teacher=side_of(queries.teacher, keys.teacher, self.scales[1]),
            numbers=self.numbers,
            query_mask=self.or_dummy(queries.mask),
            key_mask=self.or_dummy(keys.mask),
            pair_mask=self.or_dummy(self.inputs.pair_mask),
            row_weight=self.or_dummy(self.inputs.row_weight),
            query_terms=queries.terms,
            key_terms=keys.terms,
            row_terms=self.row_terms,
            column_terms=self.or_dummy(self.column_terms),
            student_held=self.or_dummy(student_held),
            teacher_held=self.or_dummy(teacher_held),
        )

    def _hold_pairs(self) -> None:
        plan, shape = self.plan, self.plan.tiles.shape
        row_blocks, column_blocks = (
            blocks_of(plan.queries, shape.rows),
            blocks_of(plan.keys, shape.columns),
        )
        self.states_count = row_blocks * column_blocks
        if plan.stashed and self.how.whole:
            self.states = self.empty(plan.matrices, 2, self.states_count, 2)
        if not plan.prepared:
            self.poison_count = 2 * (row_blocks + (0 if plan.self_affinity else column_blocks))
            self.poison = self.empty(plan.matrices, self.poison_count)
        self.launch(
            grams.gram_kernel, (plan.matrices * self.states_count, 2), self.pairs, self.states,
            self.poison, plan.queries, plan.keys, plan.offset, *plan.numbers, config=plan.tiles,
            SHAPE=shape, PREPARED=plan.prepared, STASHED=plan.stashed,
            STUDENT_SCALED=self.scaled[0], TEACHER_SCALED=self.scaled[1],
        )  # fmt: skip

    def _row_sweep(self, kernel: Any, parts: int, **constants: Any) -> tuple[Tensor, int]:
        """The partial sums of a sweep over all rows, and into how many splits."""
        plan, shape = self.plan, self.plan.sweep.shape
        blocks = plan.matrices * blocks_of(plan.queries, shape.rows)
        splits, tiles = plan.splits(blocks, blocks_of(plan.keys, shape.columns))
        partials = self.empty(plan.matrices * plan.queries, splits, parts)
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
            columns = self.empty(plan.matrices * plan.keys, column_splits, int(MEAN_PARTS))
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
        row_losses = self.empty(plan.matrices, plan.queries)
        totals = self.empty(2)
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
