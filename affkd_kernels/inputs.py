"""The shape, dtype and mask contract of a call, and its error texts (docs/semantics.md).

Whatever the caller holds (samples, token sequences, feature maps) becomes one canonical form,
:class:`Inputs`, which the reference and every kernel take. It is the only place that knows layouts.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .components import Gram
from .spec import LossSpec

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_LAYOUTS = {
    "samples": "[B, ...]",
    "tokens": "[..., L, D]",
    "pixels": "[N, C, H, W]",
    "channels": "[N, C, H, W]",
}


class Inputs(NamedTuple):
    """The tensors of one call in canonical form: N matrices of Q queries and K keys.

    Any strides and any floating dtype. Without keys the affinity is a self-affinity, K = Q.
    """

    student: Tensor  # [N, Q, Ds]
    teacher: Tensor  # [N, Q, Dt]
    student_keys: Tensor | None = None  # [N, K, Ds]
    teacher_keys: Tensor | None = None  # [N, K, Dt]
    mask: Tensor | None = None  # [N, Q] bool, True = valid
    key_mask: Tensor | None = None  # [N, K] bool
    pair_mask: Tensor | None = None  # [N, Q, K] bool
    row_weight: Tensor | None = None  # [N, Q], or [N, K] for axis="column"
    student_scale: Tensor | None = None  # []
    teacher_scale: Tensor | None = None  # []

    @property
    def dtype(self) -> torch.dtype:
        """What the computation runs in: float64 if any feature is float64, else float32."""
        features = (self.student, self.teacher, self.student_keys, self.teacher_keys)
        double = any(x is not None and x.dtype == torch.float64 for x in features)
        return torch.float64 if double else torch.float32

    @property
    def num_keys(self) -> int:
        keys = self.student if self.student_keys is None else self.student_keys
        return keys.shape[1]

    def exchanged(self) -> Inputs:
        """The inputs whose affinity is A'. A self-affinity is its own transpose."""
        if self.student_keys is None or self.teacher_keys is None:
            return self
        return self._replace(
            student=self.student_keys,
            teacher=self.teacher_keys,
            student_keys=self.student,
            teacher_keys=self.teacher,
            mask=self.key_mask,
            key_mask=self.mask,
        )

    @property
    def num_pairs(self) -> int:
        """Of all matrices together, masked or not."""
        return self.student.shape[0] * self.student.shape[1] * self.num_keys


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Switches autocast off, where it could be on."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def has_tangent(tensors: Iterable[Any]) -> bool:
    """Whether forward-mode AD wants a derivative of any, which `torch.no_grad` does not call off.

    An op of ours would lose it without a word: only what is made of torch's own ops carries it on.
    """
    # no dual number outlives its level
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    duals = (x for x in tensors if isinstance(x, Tensor))
    return any(forward_ad.unpack_dual(x).tangent is not None for x in duals)


def refuse_tangents(what: str, tensors: Iterable[Any]) -> None:
    """A NotImplementedError where a tangent would be lost."""
    if has_tangent(tensors):
        raise NotImplementedError(
            f"{what} has no forward-mode derivative, got a tensor with a tangent; use "
            'backend="reference" in one process, which has'
        )


def to_items(name: str, x: Tensor, items: str) -> Tensor:
    """The features as [..., Q, D], one row an item (a view where the layout allows)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    viewed = _as_items(x, items)
    if viewed is None:
        raise ValueError(
            f"{name} must have shape {_LAYOUTS[items]} for items={items!r}, got {list(x.shape)}"
        )
    return viewed


def _as_items(x: Tensor, items: str) -> Tensor | None:
    rank = x.dim()
    if items == "samples" and rank >= 1:
        return x if rank == 2 else x.flatten(1) if rank > 2 else x.unsqueeze(1)
    if items == "tokens" and rank >= 2:
        return x
    if items == "pixels" and rank == 4:
        return x.flatten(2).transpose(1, 2)
    return x.flatten(2) if items == "channels" and rank == 4 else None


def from_items(gradient: Tensor, shape: torch.Size, items: str) -> Tensor:
    """A gradient [N, Q, D] in the shape of the features it belongs to: undoes `to_items`.

    A scale's gradient [] is what it is.
    """
    if items == "pixels" and shape:
        return gradient.transpose(1, 2).reshape(shape)
    return gradient.reshape(shape)


def known_inputs(spec: LossSpec, student: Tensor, teacher: Tensor) -> Inputs:
    """:func:`canonical_inputs` of a call without options whose metadata was validated before."""
    s, t = _as_items(student, spec.items), _as_items(teacher, spec.items)
    assert s is not None and t is not None
    lead = s.shape[:-2]
    return Inputs(_merge_lead(s, lead), _merge_lead(t, lead))


def canonical_inputs(
    spec: LossSpec,
    student: Tensor,
    teacher: Tensor,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    pair_mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    student_scale: Tensor | float | None = None,
    teacher_scale: Tensor | float | None = None,
) -> tuple[Inputs, tuple[int, ...]]:
    """Validate a call and bring it into canonical form.

    Returns:
        The canonical tensors, and the shape of the row losses in the caller's layout: [..., Q].

    Raises:
        TypeError, ValueError: naming the argument, what came and what is valid.
    """
    s = to_items("student", student, spec.items)
    t = to_items("teacher", teacher, spec.items)
    _check_pair("student", s, "teacher", t)
    lead, queries = s.shape[:-2], s.shape[-2]
    num_keys = queries
    s_keys = t_keys = None
    if student_keys is not None or teacher_keys is not None:
        s_keys, t_keys = _keys(spec, student_keys, teacher_keys, s, t)
        num_keys = s_keys.shape[-2]
    elif key_mask is not None:
        raise ValueError("key_mask needs student_keys and teacher_keys; a self-affinity uses mask")
    if s_keys is None and spec.diagonal_offset not in (None, 0):
        raise ValueError(
            f"diagonal_offset goes with keys; a self-affinity's is 0, got {spec.diagonal_offset}"
        )
    if spec.diagonal != "keep" and s_keys is not None and spec.diagonal_offset is None:
        raise ValueError(
            f"diagonal={spec.diagonal!r} with keys needs diagonal_offset (row i's own key is "
            "i + offset), got None; without a diagonal only 'keep' is valid"
        )
    if pair_mask is not None and spec.whole_matrix:
        raise ValueError(f"pair_mask cannot go with {spec.normalization}; pass None")
    if row_weight is not None and spec.axis == "both":
        raise ValueError("row_weight cannot go with axis='both'; valid axes: 'row', 'column'")

    def flat(x: Tensor | None) -> Tensor | None:
        # [..., Q, D] to [N, Q, D] without touching what has that rank already
        return x if x is None or x.dim() == 3 else _merge_lead(x, lead)

    device = student.device
    rows = num_keys if spec.axis == "column" else queries
    inputs = Inputs(
        student=_merge_lead(s, lead),
        teacher=_merge_lead(t, lead),
        student_keys=flat(s_keys),
        teacher_keys=flat(t_keys),
        mask=_mask("mask", mask, (*lead, queries), device),
        key_mask=_mask("key_mask", key_mask, (*lead, num_keys), device),
        pair_mask=_mask("pair_mask", pair_mask, (*lead, queries, num_keys), device),
        row_weight=_row_weight(row_weight, (*lead, rows), device),
        student_scale=_scale("student_scale", student_scale, spec, student),
        teacher_scale=_scale("teacher_scale", teacher_scale, spec, teacher),
    )
    return inputs, (*lead, rows)


def _merge_lead(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """[*lead, ...] to [N, ...]."""
    if len(lead) == 1:
        return x
    return x.unsqueeze(0) if not lead else x.flatten(0, len(lead) - 1)


def _check_pair(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"{name} and {other} must hold the same items: all sizes but the feature length must "
            f"agree, got items {list(x.shape[:-1])} and {list(y.shape[:-1])}"
        )
    _check_device(other, y, x.device)


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on the student's device {device}, got {x.device}")


def _keys(
    spec: LossSpec, student_keys: Tensor | None, teacher_keys: Tensor | None, s: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    if student_keys is None or teacher_keys is None:
        missing = "student_keys" if student_keys is None else "teacher_keys"
        raise ValueError(f"student_keys and teacher_keys go together, got no {missing}")
    s_keys = to_items("student_keys", student_keys, spec.items)
    t_keys = to_items("teacher_keys", teacher_keys, spec.items)
    _check_pair("student_keys", s_keys, "teacher_keys", t_keys)
    for name, keys, queries in (("student_keys", s_keys, s), ("teacher_keys", t_keys, t)):
        if keys.shape[:-2] != queries.shape[:-2] or keys.shape[-1] != queries.shape[-1]:
            raise ValueError(
                f"{name} must have shape {[*queries.shape[:-2], 'K', queries.shape[-1]]} to go "
                f"with queries {list(queries.shape)}, got {list(keys.shape)}"
            )
        _check_device(name, keys, s.device)
    return s_keys, t_keys


def _mask(
    name: str, mask: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor (True = valid), got {came}; try .bool()")
    return _per_item(name, mask, shape, device, features=2 if name == "pair_mask" else 1)


def _row_weight(
    weight: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        came = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"row_weight must be a floating tensor, got {came}")
    return _per_item("row_weight", weight, shape, device, features=1)


def _per_item(
    name: str, x: Tensor, shape: tuple[int, ...], device: torch.device, features: int
) -> Tensor:
    """Expand to ``shape`` where x broadcasts to it, then merge the leading dimensions."""
    _check_device(name, x, device)
    if x.shape != shape:
        fits = x.dim() == len(shape) and all(
            have in (1, want) for have, want in zip(x.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name} must have shape {list(shape)}, or 1 in place of a size, "
                f"got {list(x.shape)}"
            )
        x = x.expand(shape)
    return _merge_lead(x, shape[:-features])


def _scale(name: str, scale: Any, spec: LossSpec, like: Tensor) -> Tensor | None:
    if scale is None:
        return None
    if not isinstance(spec.affinity, Gram):
        raise ValueError(f"{name} goes with affinity 'gram' only, got {spec.affinity.name!r}")
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"{name} must be a number or a 0-dim floating tensor, got {scale!r}")
        # filled on the device: a copy from the host would wait for the stream
        return torch.full((), float(scale), dtype=torch.float64, device=like.device)
    if scale.dim() != 0 or not scale.is_floating_point():
        raise ValueError(
            f"{name} must be a number or a 0-dim floating tensor, got {scale.dtype} "
            f"of shape {list(scale.shape)}"
        )
    _check_device(name, scale, like.device)
    return scale
