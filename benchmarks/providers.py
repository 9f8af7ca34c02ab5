"""The implementations a case is measured with: baselines, and ours by backend and algorithm."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.dispatch import Plan
from affkd_kernels.presets import preset

from .chunked import RECIPES, chunked_loss
from .inputs import CaseInputs
from .liger import liger_style_loss
from .registry import (
    CHUNKED,
    COMPILE,
    EAGER,
    KEOPS,
    LIGER,
    MAX_AUTOTUNE,
    METHODS,
    REFERENCE,
    Case,
)

# the package's default, twice: the second is the A/A control
AUTO, AUTO_AGAIN = "auto", "auto-again"
OURS: dict[str, dict[str, Any]] = {
    AUTO: {},
    AUTO_AGAIN: {},
    "factored": {"backend": "torch", "algorithm": "factored"},
    "cpp-dense": {"backend": "cpp", "algorithm": "dense"},
    "cpp-tiled": {"backend": "cpp", "algorithm": "tiled"},
    "triton-dense": {"backend": "triton", "algorithm": "dense"},
    "triton-tiled": {"backend": "triton", "algorithm": "tiled"},
    REFERENCE: {"backend": "reference"},
}
BASELINES = (EAGER, COMPILE, MAX_AUTOTUNE, CHUNKED, LIGER, KEOPS)
# where a case allows faster float32 products, eager is measured with those too, and ours without;
# where its features are of half precision, eager is measured on float32 copies of them too
EAGER_FAST, EAGER_FLOAT, AUTO_EXACT = "eager-fast", "eager-float32", "auto-highest"

# a dense algorithm keeps both matrices: beyond this it has no business in a benchmark
MAX_DENSE_BYTES = 2 << 30
# floating-point operations beyond which sweeping over all pairs would take minutes
MAX_PAIR_OPERATIONS = 1e13


@dataclass(frozen=True)
class Provider:
    """One implementation of a case's loss: ``loss(student, teacher, **options)``.

    ``precision`` is that of float32 products, None to leave it as it is.
    """

    name: str
    loss: Callable[..., Tensor]
    precision: str | None = None

    def step(self, inputs: CaseInputs) -> tuple[Tensor, ...]:
        """Forward and backward: the loss and its gradients."""
        if self.precision is not None:
            torch.set_float32_matmul_precision(self.precision)
        loss = self.loss(inputs.student, inputs.teacher, **inputs.options)
        return (loss.detach(), *torch.autograd.grad(loss, inputs.leaves))


def provider_names(case: Case) -> list[str]:
    """What a case is measured with, before anybody knows what is usable here."""
    method = METHODS[case.method]
    names = [family for family in BASELINES if family in case.against]
    ours = [AUTO, AUTO_AGAIN] if case.method == "rkd_angle" else list(OURS)
    if EAGER in case.against:
        names += [f"{EAGER}-{variant}" for variant in method.variants]
        names += [EAGER_FLOAT] if case.dtype != "float32" else []
    if case.precision != "highest":
        names += [EAGER_FAST] if EAGER in case.against else []
        ours = [*ours, AUTO_EXACT]
    if REFERENCE not in case.against:
        ours = [name for name in ours if name != REFERENCE]
    return names + ours


def make_provider(name: str, case: Case) -> Provider:
    """The provider of that name for a case.

    Raises:
        Unavailable: it does not exist for this case or this machine; the text says why.
    """
    precision = None
    if case.precision != "highest":
        family = name.partition("-")[0]
        exact = name == AUTO_EXACT or (family == EAGER and name != EAGER_FAST)
        precision = "highest" if exact else case.precision
    return Provider(name, _loss(name, case), precision)


def _loss(name: str, case: Case) -> Callable[..., Tensor]:
    method = METHODS[case.method]
    if name in OURS or name == AUTO_EXACT:
        return _ours(AUTO if name == AUTO_EXACT else name, case)
    if name in (EAGER, EAGER_FAST):
        return method.eager
    if name == EAGER_FLOAT:
        return _of_float32(method.eager)
    if name in (COMPILE, MAX_AUTOTUNE):
        # without the reset, the shapes of earlier cases count against the recompilation limit
        torch._dynamo.reset()
        if name == COMPILE:
            return torch.compile(method.eager, dynamic=False)
        return _with_marked_steps(torch.compile(method.eager, dynamic=False, mode="max-autotune"))
    if name in (CHUNKED, LIGER):
        if case.method not in RECIPES:
            raise Unavailable(f"no chunked form of {case.method}")
        form = chunked_loss if name == CHUNKED else liger_style_loss
        return functools.partial(form, RECIPES[case.method])
    family, _, variant = name.partition("-")
    if family == EAGER:
        _refuse_factored(variant == "features", case)
        return method.variants[variant]
    return _keops_formula(case)


def _with_marked_steps(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A new step frees what the last one's CUDA graph returned."""

    def marked(*features: Tensor, **options: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*features, **options)

    return marked


def _of_float32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def of_float32(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return loss(student.float(), teacher.float(), **options)

    return of_float32


class Unavailable(Exception):
    """A provider that does not exist here, and why."""


def plan_of(case: Case, inputs: CaseInputs, name: str = AUTO) -> Plan | None:
    """The backend, algorithm and reason of one of our providers; None for a loss without a plan.

    Raises:
        RuntimeError: it is not usable here.
    """
    spec = getattr(preset(case.method, **OURS[name]), "spec", None)
    if spec is None:
        return None
    return affkd.explain_plan(
        inputs.student,
        inputs.teacher,
        spec.affinity,
        spec.normalization,
        spec.loss,
        items=spec.items,
        **OURS[name],
        **inputs.options,
    )


def _refuse_factored(factored: bool, case: Case) -> None:
    _, queries, keys, length = case.extent
    if factored and length > max(queries, keys):
        raise Unavailable("fewer items than features: the D x D products are the larger ones")


def _ours(name: str, case: Case) -> Callable[..., Tensor]:
    _refuse_factored(name == "factored", case)
    matrices, queries, keys, length = case.extent
    size = 8 * matrices * queries * keys
    if name.endswith(("-dense", REFERENCE)) and size > MAX_DENSE_BYTES:
        raise Unavailable(f"would hold {size / 2**30:.1f} GiB of affinities")
    operations = 6 * matrices * queries * keys * length
    if name.endswith("-tiled") and operations > MAX_PAIR_OPERATIONS:
        raise Unavailable(f"would take {operations / 1e12:.0f} TFLOP over all pairs")
    return preset(case.method, **OURS[name])


def _keops_formula(case: Case) -> Callable[..., Tensor]:
    from .keops import FORMULAS

    if importlib.util.find_spec("pykeops") is None:
        raise Unavailable("pykeops is not installed")
    if case.method not in FORMULAS:
        raise Unavailable(f"no KeOps form of {case.method}")
    return FORMULAS[case.method]
