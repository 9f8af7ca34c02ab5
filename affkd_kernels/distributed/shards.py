"""What the ranks tell each other before a loss: who holds how many rows, and of which kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..inputs import FLOATING, Inputs, canonical_inputs, refuse_tangents
from ..spec import LossSpec
from .collectives import Gather, GatherForSameLoss, Shards, all_gather

_NONE = -1
# what may have a gradient; whether it has one decides what the backward sends
_REQUIRE_GRAD = ("student", "student_keys", "student_scale", "teacher", "teacher_keys")


def check_group(group: Any) -> None:
    """Raise a TypeError unless ``group`` is a process group that this process belongs to."""
    if not dist.is_available():
        raise RuntimeError("process_group needs a torch built with torch.distributed")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this process belongs to, "
            f"such as torch.distributed.group.WORLD, got {group!r}"
        )


def gather_rows(x: Tensor, process_group: Any) -> Tensor:
    """The rows of all ranks, differentiable: [B_own, ...] to [B, ...], in rank order.

    Makes keys that every rank holds from rows that each rank has some of, such as the text
    embeddings of an image-text batch. Ranks may hold different numbers of rows, 0 included; the
    other sizes and the dtype must agree. The backward sums over the ranks, so it must run on all of
    them.

    Raises:
        TypeError: no tensor, or no process group.
        NotImplementedError: a tensor with a forward-mode tangent.
    """
    check_group(process_group)
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise TypeError(f"x must be a tensor with rows, got {x!r}")
    refuse_tangents("gather_rows", (x,))
    mine = torch.tensor([x.shape[0]], device=x.device)
    ranks = dist.get_world_size(process_group)
    rank = dist.get_rank(process_group)
    sizes = all_gather(mine, Shards(process_group, rank, (1,) * ranks)).tolist()
    return Gather.apply(x, Shards(process_group, rank, tuple(sizes)), x.dtype)


class Facts(NamedTuple):
    """What a rank tells about its part of a call, as integers."""

    valid: int = 0  # 0: the arguments are wrong, and an error is raised there
    rows: int = 0
    keys: int = _NONE
    student_length: int = 0
    teacher_length: int = 0
    student_dtype: int = 0  # position in FLOATING
    teacher_dtype: int = 0
    double: int = 0
    gradients: int = 0  # bits, in the order of _REQUIRE_GRAD
    has_mask: int = 0
    has_row_weight: int = 0
    pair_columns: int = _NONE

    @staticmethod
    def of(spec: LossSpec, inputs: Inputs) -> Facts:
        keys, pair_mask = inputs.student_keys, inputs.pair_mask
        names = _REQUIRE_GRAD[:3] if spec.detach_teacher else _REQUIRE_GRAD
        differentiable = [getattr(inputs, name) for name in names]
        return Facts(
            valid=1,
            rows=inputs.student.shape[1],
            keys=_NONE if keys is None else keys.shape[1],
            student_length=inputs.student.shape[2],
            teacher_length=inputs.teacher.shape[2],
            student_dtype=FLOATING.index(inputs.student.dtype),
            teacher_dtype=FLOATING.index(inputs.teacher.dtype),
            double=int(inputs.dtype == torch.float64),
            gradients=sum(
                1 << bit
                for bit, x in enumerate(differentiable)
                if x is not None and x.requires_grad and torch.is_grad_enabled()
            ),
            has_mask=int(inputs.mask is not None),
            has_row_weight=int(inputs.row_weight is not None),
            pair_columns=_NONE if pair_mask is None else pair_mask.shape[-1],
        )


# facts that must not differ, and what to call them
_ALIKE = {
    "student_length": "student must have the same feature length",
    "teacher_length": "teacher must have the same feature length",
    "student_dtype": "student must have the same dtype",
    "teacher_dtype": "teacher must have the same dtype",
    "double": "the features must be float64, one of them at least, or none of them,",
    "gradients": f"the same of {', '.join(_REQUIRE_GRAD)} (bits 1, 2, ...) must require grad",
}


class Part(NamedTuple):
    """This rank's part of a call over the rows of all ranks, in canonical form with N = 1."""

    inputs: Inputs  # mask and row_weight are there on all ranks if on any
    shards: Shards
    same_keys: bool  # as many keys everywhere, or none


def exchange(spec: LossSpec, group: Any, tensors: tuple[Any, ...]) -> Part:
    """Validate this rank's arguments and tell the other ranks about them.

    Raises:
        TypeError, ValueError: this rank's arguments are wrong, or do not go with other ranks'.
        RuntimeError: another rank's are, and it raises the error that says what.
    """
    error: Exception | None = None
    facts, inputs = Facts(), None
    try:
        inputs = _own_inputs(spec, tensors)
        facts = Facts.of(spec, inputs)
    except (TypeError, ValueError) as raised:
        error = raised
    everybody = _tell(facts, group, tensors)
    if error is not None:
        raise error
    assert inputs is not None
    _check_alike(everybody)
    sizes = tuple(one.rows for one in everybody)
    shards = Shards(group, dist.get_rank(group), sizes)
    _check_pair_columns(everybody, shards.total)
    same_keys = len({one.keys for one in everybody}) == 1
    return Part(_completed(spec, inputs, everybody, shards), shards, same_keys)


def _own_inputs(spec: LossSpec, tensors: tuple[Any, ...]) -> Inputs:
    """The canonical inputs; without keys the pair mask [B_own, B] is checked for its rows only."""
    own = Inputs(*tensors)
    if own.pair_mask is None or own.student_keys is not None:
        return canonical_inputs(spec, *own)[0]
    pair_mask = own.pair_mask
    if not isinstance(pair_mask, Tensor) or pair_mask.dtype != torch.bool or pair_mask.dim() != 2:
        raise TypeError(
            "pair_mask must be a bool tensor [B, rows of all ranks] with process_group, got "
            f"{tuple(pair_mask.shape) if isinstance(pair_mask, Tensor) else pair_mask!r}"
        )
    # what there is of one column tells the rest: its rows, device, and whether the spec allows it
    inputs = canonical_inputs(spec, *own._replace(pair_mask=pair_mask[:, :1]))[0]
    rows = inputs.student.shape[1]
    return inputs._replace(pair_mask=pair_mask.expand(rows, -1).unsqueeze(0))


def _tell(facts: Facts, group: Any, tensors: tuple[Any, ...]) -> list[Facts]:
    device = next((x.device for x in tensors if isinstance(x, Tensor)), None)
    mine = torch.tensor([facts], device=device)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    # one wait for the device: the host must know the sizes of what it receives
    everybody = [
        Facts(*row) for row in all_gather(mine, Shards(group, rank, (1,) * ranks)).tolist()
    ]
    wrong = [number for number, one in enumerate(everybody) if not one.valid]
    if wrong and facts.valid:
        raise RuntimeError(f"the arguments of rank {wrong[0]} are not valid; its error says why")
    return everybody


def _check_alike(everybody: list[Facts]) -> None:
    for field, demand in _ALIKE.items():
        values = [getattr(one, field) for one in everybody]
        if len(set(values)) > 1:
            shown = [FLOATING[value] for value in values] if "dtype" in field else values
            raise ValueError(f"{demand} on every rank of process_group, got {shown}")
    if len({one.keys == _NONE for one in everybody}) > 1:
        raise ValueError("student_keys must be given on every rank of process_group, or on none")


def _check_pair_columns(everybody: list[Facts], total: int) -> None:
    if everybody[0].keys != _NONE:
        return
    came = [one.pair_columns for one in everybody]
    if any(columns not in (_NONE, 1, total) for columns in came):
        raise ValueError(
            f"pair_mask must have a column for each of the {total} rows of all ranks, got {came}"
        )


def _completed(spec: LossSpec, inputs: Inputs, everybody: list[Facts], shards: Shards) -> Inputs:
    """Masks and weights that some ranks have and this one has not say nothing: all True, all 1."""
    like = inputs.student
    ones = (1, like.shape[1])
    if inputs.mask is None and any(one.has_mask for one in everybody):
        inputs = inputs._replace(mask=like.new_ones(ones, dtype=torch.bool))
    if inputs.row_weight is None and any(one.has_row_weight for one in everybody):
        rows = (1, inputs.num_keys) if spec.axis == "column" else ones
        inputs = inputs._replace(row_weight=like.new_ones(rows, dtype=inputs.dtype))
    if any(one.pair_columns != _NONE for one in everybody):
        columns = shards.total if inputs.student_keys is None else inputs.num_keys
        pair_mask = inputs.pair_mask
        if pair_mask is None:
            pair_mask = like.new_ones((), dtype=torch.bool)
        inputs = inputs._replace(pair_mask=pair_mask.expand(1, like.shape[1], columns))
    return inputs


def gathered(x: Tensor, shards: Shards, wire: torch.dtype, same_loss: bool = False) -> Tensor:
    """[1, B_own, ...] to [1, B, ...], differentiable; see `Gather` and `GatherForSameLoss`."""
    function: Callable[..., Tensor] = GatherForSameLoss.apply if same_loss else Gather.apply
    return function(x.squeeze(0), shards, wire).unsqueeze(0)
