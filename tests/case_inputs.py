"""Float64 inputs of one call, made from a seed: features, keys, masks and weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Features and the keyword arguments of one call."""

    student: Tensor
    teacher: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        return self.student, self.teacher

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply to every floating tensor, e.g. a change of dtype, device or strides."""

        def apply(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return function(value) if floating else value

        options = {key: apply(value) for key, value in self.options.items()}
        return Inputs(apply(self.student), apply(self.teacher), options)

    def to(self, *args: Any) -> Inputs:
        """Everything to a device and/or the features to a dtype."""
        device = [arg for arg in args if not isinstance(arg, torch.dtype)]
        moved = self.map(lambda x: x.to(*args))
        if not device:
            return moved
        options = {
            key: value.to(*device) if isinstance(value, Tensor) else value
            for key, value in moved.options.items()
        }
        return replace(moved, options=options)

    def with_grad(self) -> tuple[Inputs, list[Tensor]]:
        """A copy whose student side requires grad, and those leaves: features, keys, scale."""
        leaves: dict[str, Tensor] = {"student": self.student.detach().clone()}
        for name in ("student_keys", "student_scale"):
            if name in self.options:
                leaves[name] = self.options[name].detach().clone()
        for leaf in leaves.values():
            leaf.requires_grad_()
        options = {**self.options, **{k: v for k, v in leaves.items() if k != "student"}}
        return Inputs(leaves["student"], self.teacher, options), list(leaves.values())


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def uniform(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers on every device."""
    made = torch.rand(*shape, generator=generator(seed), dtype=dtype, device="cpu")
    return made.to(torch.get_default_device())


def features(seed: int, *shape: int, scale: float = 0.6) -> Tensor:
    """Float64 normal features; 0.6 keeps a softmax of their Gram matrix far from one-hot."""
    made = torch.randn(*shape, generator=generator(seed), dtype=torch.float64, device="cpu")
    return scale * made.to(torch.get_default_device())


def pair(seed: int, *shape: int, teacher_dim: int | None = None, **options: Any) -> Inputs:
    """Student and teacher of `shape`; the teacher's last size may differ."""
    teacher_shape = shape if teacher_dim is None else (*shape[:-1], teacher_dim)
    return Inputs(features(seed, *shape), features(seed + 10_000, *teacher_shape), options)


def bank(seed: int, *shape: int, keys: int, teacher_dim: int, **options: Any) -> Inputs:
    """A cross-affinity: `shape` is [.., Q, D] of the student, `keys` is K."""
    inputs = pair(seed, *shape, teacher_dim=teacher_dim)
    leading, dim = shape[:-2], shape[-1]
    options["student_keys"] = features(seed + 20_000, *leading, keys, dim)
    options["teacher_keys"] = features(seed + 30_000, *leading, keys, teacher_dim)
    return replace(inputs, options=options)


def mask(seed: int, *shape: int, keep: float = 0.7) -> Tensor:
    """A bool mask, True = valid, with at least two valid entries in each row of the last dim."""
    chosen = uniform(seed + 40_000, *shape, dtype=torch.float32) < keep
    chosen[..., :2] = True
    return chosen


def weights(seed: int, *shape: int) -> Tensor:
    return 0.5 + uniform(seed + 50_000, *shape)


def own_keys(inputs: Inputs, offset: int) -> Inputs:
    """The rows themselves written into their keys from `offset` on: a gathered batch."""
    options = dict(inputs.options, diagonal_offset=offset)
    for side in ("student", "teacher"):
        rows, keys = getattr(inputs, side), options[f"{side}_keys"].clone()
        keys[..., offset : offset + rows.shape[-2], :] = rows
        options[f"{side}_keys"] = keys
    return replace(inputs, options=options)


def seed_of(*names: object) -> int:
    """A seed below 10,000 from what is tested, the same in every run and process."""
    return zlib.crc32("/".join(map(str, names)).encode()) % 10_000
