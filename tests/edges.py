"""Inputs that must not surprise: section 6 of the contract. Data only, no test.

`EDGES` are inputs with the outcome that the contract fixes for every triple; `LAYOUTS` are ways to
hold the same numbers with other strides, in features as in incoming gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from case_inputs import Inputs, bank, features, mask, pair
from cases import Call
from torch import Tensor

# finite: loss and gradients finite; zero: the loss and all gradients are exactly 0;
# nonfinite: the loss is inf or NaN; masked: finite, and the gradient of masked items exactly 0;
# half: the loss is finite, and the gradient wherever float16 can hold it
Outcome = Literal["finite", "zero", "nonfinite", "masked", "half"]


@dataclass(frozen=True)
class Edge(Call):
    """A call whose outcome is fixed, whatever the triple."""

    outcome: Outcome = "finite"


def _set(inputs: Inputs, side: str, index: Any, value: float) -> Inputs:
    """A copy of the inputs with one entry (or row) of one tensor overwritten."""
    if side in ("student", "teacher"):
        changed = getattr(inputs, side).clone()
        changed[index] = value
        return replace(inputs, **{side: changed})
    changed = inputs.options[side].clone()
    changed[index] = value
    return replace(inputs, options={**inputs.options, side: changed})


def _zero_row(seed: int, *sides: str) -> Inputs:
    inputs = pair(seed, 5, 4, teacher_dim=3)
    for side in sides:
        inputs = _set(inputs, side, 2, 0.0)
    return inputs


def _coincident(seed: int, **options: Any) -> Inputs:
    inputs = pair(seed, 5, 4, teacher_dim=3, **options)
    student, teacher = inputs.student.clone(), inputs.teacher.clone()
    student[3], teacher[3], teacher[4] = student[1], teacher[1], teacher[0]
    return replace(inputs, student=student, teacher=teacher)


def _collapsed(seed: int, *sides: str) -> Inputs:
    """All rows the same, as in a collapsed representation."""
    inputs = pair(seed, 5, 4, teacher_dim=3)
    for side in sides:
        first = getattr(inputs, side)[:1]
        inputs = replace(inputs, **{side: first.expand(5, -1).clone()})
    return inputs


def _all_zero(seed: int) -> Inputs:
    return pair(seed, 4, 3).map(torch.zeros_like)


def _masked_poison(seed: int, value: float, **options: Any) -> Inputs:
    valid = torch.tensor([True, True, False, True, False, True])
    inputs = pair(seed, 6, 4, teacher_dim=3, mask=valid, **options)
    inputs = _set(inputs, "student", 2, value)
    inputs = _set(inputs, "student", (4, 1), value)
    return _set(inputs, "teacher", (2, 0), value)


def _masked_key_poison(seed: int, value: float) -> Inputs:
    valid = torch.tensor([True, False, True, True, True, True])
    inputs = bank(seed, 5, 4, keys=6, teacher_dim=3, key_mask=valid, mask=mask(seed, 5))
    inputs = _set(inputs, "student_keys", 1, value)
    return _set(inputs, "teacher_keys", (1, 2), value)


def _overflow(seed: int) -> Inputs:
    """Float16 features whose Gram matrix passes the largest half, 65504."""
    return pair(seed, 6, 4).map(lambda x: (300.0 * x / x.abs().max()).to(torch.float16))


def _large(seed: int) -> Inputs:
    """A common offset a thousand times the spread: distances must keep their digits."""
    return pair(seed, 6, 4).map(lambda x: x + 1000.0)


INF, NAN = float("inf"), float("nan")

EDGES = (
    Edge("zero-row-student", lambda s: _zero_row(s, "student")),
    Edge("zero-row-teacher", lambda s: _zero_row(s, "teacher")),
    Edge("zero-row-both", lambda s: _zero_row(s, "student", "teacher")),
    Edge("all-zero", _all_zero),
    Edge("coincident", _coincident),
    Edge("coincident-excluded", lambda s: _coincident(s, diagonal="exclude")),
    Edge("collapsed-student", lambda s: _collapsed(s, "student")),
    Edge("collapsed-teacher", lambda s: _collapsed(s, "teacher")),
    Edge("collapsed-both", lambda s: _collapsed(s, "student", "teacher")),
    Edge("one-row", lambda s: pair(s, 1, 4, teacher_dim=3)),
    Edge("one-row-one-key", lambda s: bank(s, 1, 4, keys=1, teacher_dim=3)),
    Edge("one-valid-row", lambda s: pair(s, 4, 3, mask=torch.arange(4) == 2)),
    Edge("one-row-zeroed", lambda s: pair(s, 1, 4, teacher_dim=3, diagonal="zero")),
    Edge("one-dimension", lambda s: pair(s, 5, 1)),
    Edge("two-rows", lambda s: pair(s, 2, 3, teacher_dim=4)),
    Edge("common-offset", _large),
    Edge("half-overflow", _overflow, "half"),
    Edge("no-rows", lambda s: pair(s, 0, 4, teacher_dim=3), "zero"),
    Edge("no-rows-with-keys", lambda s: bank(s, 0, 4, keys=3, teacher_dim=3), "zero"),
    Edge("no-keys", lambda s: bank(s, 3, 4, keys=0, teacher_dim=3), "zero"),
    Edge("no-matrices", lambda s: pair(s, 0, 4, 3, items="tokens"), "zero"),
    Edge("no-tokens", lambda s: pair(s, 2, 0, 3, items="tokens", reduction="batchmean"), "zero"),
    Edge(
        "nothing-valid",
        lambda s: pair(s, 4, 3, mask=torch.zeros(4, dtype=torch.bool)),
        "zero",
    ),
    Edge(
        "nothing-valid-batchmean",
        lambda s: pair(s, 4, 3, mask=torch.zeros(4, dtype=torch.bool), reduction="batchmean"),
        "zero",
    ),
    Edge(
        "no-pair",
        lambda s: pair(s, 4, 3, pair_mask=torch.zeros(4, 4, dtype=torch.bool)),
        "zero",
    ),
    Edge("only-the-diagonal-excluded", lambda s: pair(s, 1, 3, diagonal="exclude"), "zero"),
    Edge("nan-masked", lambda s: _masked_poison(s, NAN), "masked"),
    Edge("inf-masked", lambda s: _masked_poison(s, INF), "masked"),
    Edge("nan-masked-batchmean", lambda s: _masked_poison(s, NAN, reduction="batchmean"), "masked"),
    Edge("nan-masked-key", lambda s: _masked_key_poison(s, NAN), "masked"),
    Edge("inf-masked-key", lambda s: _masked_key_poison(s, -INF), "masked"),
    *(
        Edge(
            f"{str(value).replace('-', 'minus-')}-in-{side.replace('_', '-')}",
            lambda s, side=side, value=value: _set(
                bank(s, 5, 4, keys=6, teacher_dim=3)
                if side.endswith("keys")
                else pair(s, 5, 4, teacher_dim=3),
                side,
                (1, 0),
                value,
            ),
            "nonfinite",
        )
        for value in (NAN, INF, -INF)
        for side in ("student", "teacher", "student_keys", "teacher_keys")
    ),
)


def edges_with_outcome(outcome: Outcome) -> list[Edge]:
    return [edge for edge in EDGES if edge.outcome == outcome]


def edge(name: str) -> Edge:
    return next(one for one in EDGES if one.name == name)


# layouts: the same values, other strides


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _strided(x: Tensor) -> Tensor:
    """Every other column of a wider tensor, whose own columns hold NaN."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), NAN)
    wide[..., ::2] = x
    return wide[..., ::2]


def _offset(x: Tensor) -> Tensor:
    """A view that starts inside a larger storage and skips rows."""
    tall = x.new_full((3, *x.shape), NAN)
    tall[1] = x
    return tall[1]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else _transposed(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "strided": _strided,
    "offset": _offset,
    "channels_last": _channels_last,
}


def expanded_pair(seed: int) -> Inputs:
    """Features with stride 0: rows repeat, in memory only one exists."""
    return Inputs(features(seed, 1, 4).expand(5, 4), features(seed + 1, 5, 1).expand(5, 3))
