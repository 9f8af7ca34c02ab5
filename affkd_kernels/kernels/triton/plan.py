"""What does not change between calls of the same form, and the way to launch a kernel.

A plan belongs to the metadata of a call: spec, shapes, strides, dtypes, devices. It remembers what
a call allocated and launched, so that a later call of the same form passes by Triton's own, slower
look-up and by most of this package's.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ...inputs import Inputs
from ...spec import LossSpec
from ..result import Needs
from . import configs
from .choices import Choices, make_choices, make_numbers
from .replay import Replay

_HALF = (torch.float16, torch.bfloat16)


def blocks_of(count: int, block: int) -> int:
    return -(-count // block)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type not in ("cuda", "xpu"):
        return nullcontext()
    backend = getattr(torch, device.type)
    return nullcontext() if device.index == backend.current_device() else backend.device(device)


class Metadata(NamedTuple):
    """Of a tensor: all of it that a compiled kernel depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # to 16 bytes


class Form(NamedTuple):
    """The key of a plan."""

    spec: LossSpec
    needs: Needs | None  # None where row losses are wanted
    algorithm: str
    factor: float  # multiplies the loss's weight
    precision: str
    device: torch.device
    capability: int
    tensors: tuple[Metadata | None, ...]

    @staticmethod
    def of(
        spec: LossSpec, inputs: Inputs, needs: Needs | None, algorithm: str, factor: float
    ) -> Form:
        tensors = [
            x if x is None else Metadata(x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)
            for x in inputs
        ]
        precision, device = configs.dot_precision(), inputs.student.device
        capability, _ = configs.architecture(device)
        return Form(spec, needs, algorithm, factor, precision, device, capability, tuple(tensors))


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
        self.stashed = self._stashes()
        # kernels of their own for lengths and means; a maximum wants equal pairs to be equal
        how = self.how
        self.prepared = not self.stashed or how.largest or how.centered_features
        self.copied, self.moved = (how.copied and x for x in (self.prepared, not self.prepared))
        self.numbers = make_numbers(spec, form.factor, (self.student_dim, self.teacher_dim))
        _, self.multiprocessors = configs.architecture(form.device)
        self.tiles, self.gradient, self.product, self.key_product = self._configs()
        # of the sweeps, which in the dense form only read what others computed
        self.sweep = self.tiles
        if self.stashed:
            self.sweep = configs.rows_config(form.capability, self.keys)
        elif self.dense:
            self.sweep = configs.held_config(form.capability)
        self.sweep = configs.addressed(self.sweep, self.keys, 0)
        self.small_options = configs.small_options(form.capability, self.dtype)
        # how to do it again, once a first call has come to its end
        self.replay: Replay | None = None

    def _choices(self) -> Choices:
        known = self.metadata
        key_mask = known.mask if self.self_affinity else known.key_mask
        masks = (known.mask is not None, key_mask is not None, known.pair_mask is not None)
        weighted = known.row_weight is not None
        return make_choices(self.form.spec, self.self_affinity, masks, weighted, self.dtype)

    def _stashes(self) -> bool:
        """Whether three kernels do: an everyday batch, whose pairs are held and not centered."""
        if not self.dense or self.how.centered or self.queries > configs.STASH_QUERIES:
            return False
        shape = configs.rows_config(self.form.capability, self.keys).shape
        if self.matrices * blocks_of(self.queries, shape.rows) > configs.STASH_PARTS:
            return False
        tiles = blocks_of(self.queries, 32) * blocks_of(self.keys, 32)
        return not self.how.whole or tiles <= configs.STASH_TILES

    def _configs(self) -> tuple[configs.Config, ...]:
        known, precision, capability = self.metadata, self.form.precision, self.form.capability
        sides = (known.student, known.teacher, known.student_keys, known.teacher_keys)
        dtypes = {self._read(x) for x in sides if x is not None}
        if self.how.copied:
            # what loses a mean is in the dtype of the computation
            if dtypes <= set(_HALF):
                precision = configs.precision_of_copies()
            dtypes = {self.dtype}
        mixed = len(dtypes) > 1
        features = self.dtype if mixed else dtypes.pop()
        aligned = all(x is None or self._aligned(x) for x in sides)
        product_config = configs.multiply_config if self.stashed else configs.product_config
        products = [
            product_config(capability, self._multiplied(x), precision)
            for x in (known.student_keys or known.student, known.student)
        ]
        tile_config = configs.stash_config if self.stashed else configs.sweep_config
        # only float32 products have a choice
        of_pairs = precision if features == torch.float32 else "ieee"
        operands = configs.Operands(features, of_pairs, mixed, aligned, self.how.pair_mask)
        tiles = tile_config(capability, operands)
        gradient = configs.gradient_config(capability, operands)
        if self.how.largest and not self.dense:
            tiles = gradient = configs.repeatable(tiles, self.self_affinity)
        longest = max(self.student_dim, self.teacher_dim)
        tiles, gradient = (configs.addressed(x, self.keys, longest) for x in (tiles, gradient))
        return (tiles, gradient, *products)

    def _aligned(self, x: Any) -> bool:
        """Whether Triton knows that every row of some features starts at a multiple of 16."""
        steps = x.shape[2:] if self.copied else (*x.stride[:2], x.shape[2])
        return all(step % 16 == 0 for step in steps) and (self.copied or x.aligned)

    def _read(self, features: Any) -> torch.dtype:
        """The dtype in which kernels read features: see `readable`."""
        return self.dtype if self.dtype == torch.float64 else features.dtype

    def _multiplied(self, features: Any) -> torch.dtype:
        """The dtype in which V meets features."""
        return self.dtype if self.how.copied else self._read(features)

    def splits(self, blocks: int, tiles: int) -> tuple[int, int]:
        return configs.splits_of(blocks, tiles, self.multiprocessors)


make_plan = functools.lru_cache(maxsize=512)(Plan)


def compile_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, int],
) -> Any:
    """What to launch, now and in later calls: two binaries could differ in the last bit.

    It has registers enough, where some number of them is; the interpreter has nothing compiled.
    """
    first = None
    for some in (options, *configs.other_options(options)):
        compiled = kernel.warmup(*args, grid=grid, **constants, **some)
        if compiled is None:
            return None
        compiled._init_handles()  # which loads it, and counts
        if not compiled.n_spills:
            return compiled
        first = first or compiled
    return first
