"""An affinity loss over the rows of all ranks, in the form that moves and repeats least.

Four forms, from the cheapest on (docs/distributed.md has their costs):

- *local*: what a rank's rows need lies on the rank already (matrices of its own, keys);
- *factored*: no row travels, only moments of R x R numbers (:mod:`.factored`);
- *own rows*: own rows against the rows of all ranks, where a statistic belongs to a row;
- *all rows*: every rank computes the whole loss, where a statistic belongs to the matrix.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import functional, reference
from ..components import NoNormalization, RowL1, RowL2, RowSum, Softmax
from ..dispatch import make_plan
from ..fused import summed
from ..inputs import Inputs, canonical_inputs, refuse_tangents
from ..kernels.counts import Counts
from ..spec import LossSpec
from . import factored
from .collectives import ScaleGradient, Shards, SumOverRanks
from .shards import Part, check_group, exchange, gathered

# what divides by a statistic of the row, or by none
_ROW_WISE = (NoNormalization, RowL2, RowL1, RowSum, Softmax)


# collectives whose sizes other ranks decide have no place in a graph: it breaks here
@torch.compiler.disable
def evaluate(spec: LossSpec, group: Any, tensors: tuple[Any, ...]) -> Tensor:
    """The loss of the rows of all ranks, for this rank's tensors in the order of `Inputs`."""
    check_group(group)
    if dist.get_world_size(group) == 1:
        return functional.evaluate(spec, *tensors)
    refuse_tangents("a loss over several ranks", tensors)
    if spec.items != "samples":
        return _own_matrices(spec, group, tensors)
    part = exchange(spec, group, tensors)
    inputs, shards = _wide(spec, part.inputs), part.shards
    row_wise = spec.builtin and isinstance(spec.normalization, _ROW_WISE)
    if inputs.student_keys is None:
        if factored.pays(spec, inputs, shards):
            return factored.loss(spec, inputs, shards)
        return _own_rows(spec, inputs, part) if row_wise else _all_rows(spec, inputs, part)
    by_column = spec.axis != "row"
    if (by_column or not row_wise) and not part.same_keys:
        raise ValueError(
            f"student_keys must be the same on every rank of process_group for {spec.normalization}"
            ", got different numbers of keys; gather_rows makes keys of all ranks from each rank's"
        )
    if not row_wise or (by_column and spec.reduction == "none"):
        return _all_rows(spec, inputs, part)
    parts = {
        "row": (_rows_by_keys,),
        "column": (_keys_by_rows,),
        "both": (_rows_by_keys, _keys_by_rows),
    }[spec.axis]
    losses = [form(spec, inputs, part) for form in parts]
    return sum(losses[1:], losses[0]) / len(losses)


@torch.compiler.disable
def rows_of_all_ranks(spec: LossSpec, group: Any, tensors: tuple[Any, ...]) -> Inputs:
    """The canonical inputs of all ranks' rows, for a scalar that each rank computes from them."""
    check_group(group)
    refuse_tangents("a loss over several ranks", tensors)
    part = exchange(spec, group, tensors)
    return _all_inputs(spec, _wide(spec, part.inputs), part, same_loss=True)


@torch.compiler.disable
def mean_over_ranks(total: Tensor, count: Tensor | int, group: Any) -> Tensor:
    """The sum over the ranks of ``total`` [], divided by that of ``count`` (at least 1)."""
    refuse_tangents("a loss over several ranks", (total,))
    own_count = torch.as_tensor(count, device=total.device)
    everybody, divisor = SumOverRanks.apply(total, own_count, group)
    return everybody / divisor.clamp(min=1).to(total.dtype)


def _wide(spec: LossSpec, inputs: Inputs) -> Inputs:
    """Queries in the computation dtype, so that gradients are summed in it; the teacher constant.

    Without the latter a teacher that requires grad would make the backward communicate.
    """
    teacher = inputs.teacher.detach() if spec.detach_teacher else inputs.teacher
    return inputs._replace(
        student=inputs.student.to(inputs.dtype), teacher=teacher.to(inputs.dtype)
    )


def _own_matrices(spec: LossSpec, group: Any, tensors: tuple[Any, ...]) -> Tensor:
    """One matrix for each leading index: a rank computes its own, only the mean is everybody's."""
    if spec.reduction == "none":
        return functional.evaluate(spec, *tensors)
    inputs, _ = canonical_inputs(spec, *tensors)
    if spec.axis != "both" or inputs.student_keys is None:
        exchanged = inputs.exchanged() if spec.axis == "column" else inputs
        local = functional.evaluate(summed(spec), *tensors)
        return mean_over_ranks(local, _count(spec, exchanged), group)
    # rows and columns have counts of their own
    halves = [_own_matrices(_along(spec, axis), group, tensors) for axis in ("row", "column")]
    return (halves[0] + halves[1]) / 2


def _own_rows(spec: LossSpec, inputs: Inputs, part: Part) -> Tensor:
    """A self-affinity: own rows as queries, the rows of all ranks as keys."""
    shards = part.shards
    # A is symmetric: a softmax over columns is one over rows
    spec = dataclasses.replace(_along(spec, "row"), diagonal_offset=shards.start)
    wires = part.inputs.student.dtype, part.inputs.teacher.dtype
    student, teacher = inputs.student, inputs.teacher
    keys = inputs._replace(
        student_keys=student,
        teacher_keys=gathered(teacher, shards, wires[1]),
        key_mask=_gathered_mask(inputs.mask, shards),
    )
    if _symmetric_slope(spec, keys):
        # dL/dA is symmetric as well: an item's gradient as a key is its gradient as a query
        keys = keys._replace(
            student=ScaleGradient.apply(student, 2.0),
            student_keys=gathered(student.detach(), shards, wires[0]),
        )
    else:
        keys = keys._replace(student_keys=gathered(student, shards, wires[0]))
    return _row_form(spec, keys, shards.group)


def _symmetric_slope(spec: LossSpec, inputs: Inputs) -> bool:
    """Whether dL/dA_ij = dL/dA_ji, in a call that needs no second derivative."""
    plain = inputs.row_weight is None and inputs.pair_mask is None and spec.reduction != "none"
    if not plain or not isinstance(spec.normalization, NoNormalization):
        return False
    return make_plan(spec, inputs).backend != "reference"


def _rows_by_keys(spec: LossSpec, inputs: Inputs, part: Part) -> Tensor:
    """Own rows against the keys that this rank holds."""
    offset = spec.diagonal_offset
    if offset is not None:
        offset += part.shards.start
    spec = dataclasses.replace(_along(spec, "row"), diagonal_offset=offset)
    return _row_form(spec, inputs, part.shards.group)


def _keys_by_rows(spec: LossSpec, inputs: Inputs, part: Part) -> Tensor:
    """A softmax over columns: each rank takes its share of the keys against all ranks' rows."""
    shards = part.shards
    ranks, count = len(shards.sizes), inputs.num_keys
    share = slice(count * shards.rank // ranks, count * (shards.rank + 1) // ranks)
    wires = part.inputs.student.dtype, part.inputs.teacher.dtype
    student_keys, teacher_keys = inputs.student_keys, inputs.teacher_keys
    assert student_keys is not None and teacher_keys is not None
    exchanged = Inputs(
        student=student_keys[:, share],
        teacher=teacher_keys[:, share],
        student_keys=gathered(inputs.student, shards, wires[0]),
        teacher_keys=gathered(inputs.teacher, shards, wires[1]),
        mask=None if inputs.key_mask is None else inputs.key_mask[:, share],
        key_mask=_gathered_mask(inputs.mask, shards),
        row_weight=None if inputs.row_weight is None else inputs.row_weight[:, share],
        student_scale=inputs.student_scale,
        teacher_scale=inputs.teacher_scale,
    )
    offset = spec.diagonal_offset
    if offset is not None:
        offset = share.start - offset
    spec = dataclasses.replace(_along(spec, "row"), diagonal_offset=offset)
    return _row_form(spec, exchanged, shards.group)


def _row_form(spec: LossSpec, inputs: Inputs, group: Any) -> Tensor:
    """The loss of everybody's queries, each rank's against the keys that it has at hand."""
    if spec.reduction == "none":
        return _of_matrices(spec, inputs).squeeze(0)
    total = _of_matrices(summed(spec), inputs)
    if spec.reduction in ("mean", "batchmean"):
        return mean_over_ranks(total, _count(spec, inputs), group)
    # one matrix in all
    return mean_over_ranks(total, 0, group)


def _all_rows(spec: LossSpec, inputs: Inputs, part: Part) -> Tensor:
    """Every rank computes the loss of all rows, and keeps its own rows' gradient."""
    shards = part.shards
    everything = _all_inputs(spec, inputs, part, same_loss=spec.reduction != "none")
    losses = _of_matrices(spec, everything)
    if spec.reduction != "none":
        return losses
    of_keys = spec.axis == "column" and inputs.student_keys is not None
    return losses[0] if of_keys else losses[0, shards.own]


def _all_inputs(spec: LossSpec, inputs: Inputs, part: Part, same_loss: bool) -> Inputs:
    """The call that one process would make of the rows of all ranks."""
    shards, row_weight = part.shards, inputs.row_weight
    of_keys = spec.axis == "column" and inputs.student_keys is not None
    if row_weight is not None and not of_keys:
        row_weight = gathered(row_weight, shards, row_weight.dtype)
    return inputs._replace(
        student=gathered(inputs.student, shards, part.inputs.student.dtype, same_loss),
        teacher=gathered(inputs.teacher, shards, part.inputs.teacher.dtype, same_loss),
        mask=_gathered_mask(inputs.mask, shards),
        pair_mask=_gathered_mask(inputs.pair_mask, shards),
        row_weight=row_weight,
    )


def _gathered_mask(mask: Tensor | None, shards: Shards) -> Tensor | None:
    return None if mask is None else gathered(mask, shards, torch.bool)


def _of_matrices(spec: LossSpec, inputs: Inputs) -> Tensor:
    """The loss of canonical inputs [1, ...]; their layout is that of tokens."""
    return functional.evaluate(dataclasses.replace(spec, items="tokens"), *inputs)


def _along(spec: LossSpec, axis: str) -> LossSpec:
    """The spec of one axis of a softmax."""
    if spec.axis == axis or not isinstance(spec.normalization, Softmax):
        return spec
    normalization = dataclasses.replace(spec.normalization, axis=axis)
    return dataclasses.replace(spec, normalization=normalization)


def _count(spec: LossSpec, inputs: Inputs) -> Tensor | int:
    """This rank's share of what the reduction divides by; 0 divides by nothing."""
    if spec.reduction == "sum":
        return 0
    if spec.reduction == "matrixmean":
        return inputs.student.shape[0]
    if inputs.pair_mask is None:
        counts = Counts.of(spec, inputs)
        return counts.pairs if spec.reduction == "mean" else counts.rows
    offset = 0 if inputs.student_keys is None else spec.diagonal_offset
    pairs, _ = reference.pairs_of(spec, inputs, offset)
    return pairs.sum() if spec.reduction == "mean" else pairs.any(-1).sum()
