"""The tensors of a case."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import METHODS, Case


@dataclass
class CaseInputs:
    """What a loss is called with, and what it is differentiated by."""

    student: Tensor
    teacher: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Tensor]:
        tensors = (self.student, *self.options.values())
        return [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]

    def to(self, dtype: torch.dtype) -> CaseInputs:
        """The same values in another floating dtype, masks untouched."""

        def convert(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return x.detach().to(dtype).requires_grad_(x.requires_grad)

        options = {name: convert(value) for name, value in self.options.items()}
        return CaseInputs(convert(self.student), convert(self.teacher), options)


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> CaseInputs:
    """A teacher of normal features, and a student that shares half of their variance.

    The values depend on the case's shapes, the seed and the type of device alone.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    teacher = normal(*case.shape)
    student = (teacher + normal(*case.shape)) / 2**0.5
    options: dict[str, Any] = {}
    if case.bank:
        options = _keys(case, normal, teacher)
    if case.masked:
        options["mask"] = _padding_mask(case)
    format_ = torch.channels_last if case.channels_last else torch.contiguous_format
    student, teacher = (x.to(device, dtype, memory_format=format_) for x in (student, teacher))
    for name, value in options.items():
        keeps = value.dtype == torch.bool
        options[name] = value.to(device) if keeps else value.to(device, dtype)
    if METHODS[case.method].trained_keys:
        options["student_keys"].requires_grad_()
    return CaseInputs(student.requires_grad_(), teacher, options)


def _keys(case: Case, normal: Any, teacher: Tensor) -> dict[str, Tensor]:
    length = case.shape[1]
    teacher_keys = F.normalize(normal(case.bank, length))
    if case.method == "seed":
        # the batch's own embeddings come first, and both sides share the bank
        teacher_keys[: len(teacher)] = F.normalize(teacher)
        return {"student_keys": teacher_keys, "teacher_keys": teacher_keys}
    student_keys = F.normalize(teacher_keys + normal(case.bank, length) / length**0.5)
    keys = {"student_keys": student_keys, "teacher_keys": teacher_keys}
    if case.method == "clip_affinity":
        keys |= {"student_scale": torch.tensor(2.0), "teacher_scale": torch.tensor(3.0)}
    return keys


def _padding_mask(case: Case) -> Tensor:
    """[N, 1, L]: the last quarter of every second sequence is padding."""
    mask = torch.ones(case.shape[0], 1, case.shape[-2], dtype=torch.bool)
    mask[1::2, :, -(case.shape[-2] // 4) :] = False
    return mask
