"""Everything that compiling the kernels ahead of time needs, without a GPU.

A call is walked through over tensors of the "meta" device, and its launches are written down
instead of done: what is compiled is what would run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...inputs import Inputs
from ...spec import LossSpec
from ..result import Needs
from . import angle
from .call import Call
from .configs import Config
from .launch import compute
from .plan import Form, Plan

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.int64: "*i64",
}


class Shipped(NamedTuple):
    """The arguments of ``triton.compiler.ASTSource`` and the options of ``triton.compile``."""

    kernel: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]
    capability: int
    # whether its launch compiles it with other options where it spills
    retried: bool = True

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


class Recording(Call):
    """A call whose launches are written down."""

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self.records: list[Shipped] = []
        super().__init__(plan, inputs)

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        config: Config | None = None,
        **constants: Any,
    ) -> None:
        constants = {"HOW": self.how, **constants}
        options = self.plan.small_options if config is None else config.options
        self.records.append(_shipped(kernel, args, constants, options, self.plan.form.capability))


def kernels_of(
    spec: LossSpec,
    inputs: Inputs,
    needs: Needs,
    algorithm: str,
    capability: int,
    precision: str = "ieee",
) -> Iterator[Shipped]:
    """The kernels of a call over inputs of the "meta" device, each once.

    Args:
        capability: of the architecture to compile for, as in 90.
        precision: of float32 products: "ieee", "tf32x3" or "tf32".
    """
    form = Form.of(spec, inputs, needs, algorithm, 1.0)
    form = form._replace(capability=capability, precision=precision)
    call = Recording(Plan(form), inputs)
    compute(call, needs)
    seen = set()
    for record in call.records:
        key = repr(record)
        if key not in seen:
            seen.add(key)
            yield record


def angle_kernels(dtype: torch.dtype, capability: int) -> Iterator[Shipped]:
    """The sweeps of RKD's angle loss, computed in `dtype`, with and without a gradient."""
    squared = torch.empty(1, 64, 64, dtype=torch.float64, device="meta")
    inverse = squared.to(dtype)
    args = (squared, inverse, squared, inverse, squared, inverse, squared.shape[1], 1.0)
    for linear, gradient in itertools.product((False, True), repeat=2):
        constants = angle.constants(dtype, linear, gradient)
        shipped = _shipped(angle.angle_kernel, args, constants, angle.OPTIONS, capability)
        yield shipped._replace(retried=False)


def _shipped(
    kernel: Any,
    args: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, int],
    capability: int,
) -> Shipped:
    names = [parameter.name for parameter in kernel.params]
    general = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature = {
        parameter.name: parameter.annotation_type or _type(arg)
        for parameter, arg in zip(kernel.params, args, strict=False)
    }
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {
        path: [["tt.divisibility", 16]]
        for position, (name, arg) in enumerate(zip(names, args, strict=False))
        for path in _divisible(arg, (position,), name not in general)
    }
    values = {name: constants[name] for name in names[len(args) :]}
    return Shipped(kernel, signature, values, attributes, options, capability)


def _type(arg: Any) -> Any:
    if isinstance(arg, tuple):
        types = [_type(entry) for entry in arg]
        return type(arg)(*types) if hasattr(arg, "_fields") else tuple(types)
    if isinstance(arg, Tensor):
        return _POINTERS[arg.dtype]
    return "i32" if -(2**31) <= arg < 2**31 else "i64"


def _divisible(arg: Any, path: tuple[int, ...], specialized: bool) -> Iterator[tuple[int, ...]]:
    """The paths of what is divisible by 16: pointers, and integers that the JIT would look at."""
    if isinstance(arg, tuple):
        for position, entry in enumerate(arg):
            yield from _divisible(entry, (*path, position), specialized)
    elif isinstance(arg, Tensor) or (specialized and isinstance(arg, int) and arg % 16 == 0):
        yield path
