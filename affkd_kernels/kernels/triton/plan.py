"""What does not change between calls of the same form, and the way to launch a kernel.

A plan belongs to the metadata of a call: spec, shapes, strides, dtypes, devices. It remembers the
compiled kernels in the order of their launches, so that a later call of the same form passes by
Triton's own, slower look-up.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...inputs import Inputs
from ...spec import LossSpec
from ..result import Needs
from . import configs
from .choices import Choices, make_choices, make_numbers

_HALF = (torch.float16, torch.bfloat16)


def blocks_of(count: int, block: int) -> int:
    return -(-count // block)


class Metadata(NamedTuple):
    """Of a tensor: all of it that a compiled kernel depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # to 16 bytes

    @staticmethod
    def of(x: Tensor | None) -> Metadata | None:
        return x if x is None else Metadata(x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)


class Form(NamedTuple):
    """The key of a plan."""

    spec: LossSpec
    needs: Needs
    algorithm: str
    factor: float  # multiplies the loss's weight
    precision: str
    device: torch.device
    capability: int
    tensors: tuple[Metadata | None, ...]

    @staticmethod
    def of(spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str, factor: float) -> Form:
        tensors = tuple(map(Metadata.of, inputs))
        precision, device = configs.dot_precision(), inputs.student.device
        capability, _ = configs.architecture(device)
        return Form(spec, needs, algorithm, factor, precision, device, capability, tensors)


class Plan:
    """Sizes, choices and configurations of a form of call, and its compiled kernels."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.metadata = Inputs(*form.tensors)  # type: ignore[arg-type]
        student, teacher = self.metadata.student, self.metadata.teacher
        keys = self.metadata.student_keys
        self.self_affinity = keys is None
        self.matrices, self.queries, self.student_dim = student.shape
        self.teacher_dim = teacher.shape[2]
        self.keys = self.queries if keys is None else keys.shape[1]
        self.dtype = self.metadata.dtype
        spec = form.spec
        self.offset = 0 if self.self_affinity else spec.diagonal_offset or 0
        self.reduction = "sum" if spec.reduction == "none" else spec.reduction
        self.dense = form.algorithm == "dense"
        self.how = self._choices()
        self.numbers = make_numbers(
            spec, form.factor, (self.student_dim, self.teacher_dim), form.device
        )
        _, self.multiprocessors = configs.architecture(form.device)
        self.tiles, self.gradient, self.product, self.key_product = self._configs()
        # of the sweeps, which in the dense form only read what others computed
        self.sweep = configs.held_config(form.capability) if self.dense else self.tiles
        self.small_options = configs.small_options(form.capability, self.dtype)
        # of every launch of a call, in order; empty before the first call has come to its end
        self.compiled: tuple[Any, ...] = ()

    def _choices(self) -> Choices:
        known = self.metadata
        features = (known.student, known.teacher, known.student_keys, known.teacher_keys)
        key_mask = known.mask if self.self_affinity else known.key_mask
        masks = (known.mask is not None, key_mask is not None, known.pair_mask is not None)
        full_width = not any(x is not None and x.dtype in _HALF for x in features)
        weighted = known.row_weight is not None
        return make_choices(
            self.form.spec, self.self_affinity, masks, weighted, self.dtype, full_width
        )

    def _configs(self) -> tuple[configs.Config, ...]:
        known, precision, capability = self.metadata, self.form.precision, self.form.capability
        sides = (known.student, known.teacher, known.student_keys, known.teacher_keys)
        # a copy is in the dtype of the computation
        dtypes = {self.dtype if self.how.copied else x.dtype for x in sides if x is not None}
        mixed = len(dtypes) > 1 or (self.dtype == torch.float64 and dtypes != {torch.float64})
        features = self.dtype if mixed else dtypes.pop()
        aligned = all(x is None or self._aligned(x) for x in sides)
        if not self.dense:
            precision = configs.symmetric(self.how, precision)
        return (
            configs.sweep_config(capability, features, precision, mixed, aligned),
            configs.gradient_config(capability, features, precision, mixed, aligned),
            *(
                configs.product_config(capability, self._multiplied(x), self.form.precision)
                for x in (known.student_keys or known.student, known.student)
            ),
        )

    def _aligned(self, x: Any) -> bool:
        """Whether Triton knows that every row of some features starts at a multiple of 16."""
        steps = x.shape[2:] if self.how.copied else (*x.stride[:2], x.shape[2])
        return all(step % 16 == 0 for step in steps) and (self.how.copied or x.aligned)

    def _multiplied(self, features: Any) -> torch.dtype:
        """The dtype in which V meets features."""
        wide = self.how.copied or self.dtype == torch.float64
        return self.dtype if wide else features.dtype

    def splits(self, blocks: int, tiles: int) -> tuple[int, int]:
        return configs.splits_of(blocks, tiles, self.multiprocessors)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.form.device)


make_plan = functools.lru_cache(maxsize=512)(Plan)


def without_spills(
    compiled: Any,
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, int],
) -> Any:
    """What to launch from the next call on: the same kernel, with registers enough."""
    if not getattr(compiled, "n_spills", 0):
        return compiled
    for other in configs.other_options(options):
        candidate = kernel.warmup(*args, grid=grid, **constants, **other)
        candidate._init_handles()  # which loads it, and counts
        if not candidate.n_spills:
            return candidate
    return compiled
