"""Which backend and algorithm computes a call: from metadata alone, never from values."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .inputs import Inputs
from .kernels import factored
from .spec import LossSpec


class Plan(NamedTuple):
    """What will run, and why."""

    backend: str
    algorithm: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}/{self.algorithm}: {self.reason}"


# `factored` costs O(B D^2) and everything else O(B^2 D): it pays from about this many items per
# feature; `python -m benchmarks.crossover` measures it
FACTORED_FROM = {"cpu": 2.0, "cuda": 4.0}


def make_plan(spec: LossSpec, inputs: Inputs) -> Plan:
    """The plan for canonical inputs.

    Raises:
        RuntimeError: a backend or algorithm asked for by name that is not usable here, and why.
        ``backend="auto"`` with ``algorithm="auto"`` never raises.
    """
    blocked = _reference_only(spec, inputs)
    if spec.backend == "reference" or blocked:
        if spec.backend not in ("auto", "reference") or spec.algorithm not in ("auto", "dense"):
            raise RuntimeError(
                f"backend={spec.backend!r}, algorithm={spec.algorithm!r} is not usable here: "
                f"{blocked}; use backend='reference'"
            )
        return Plan("reference", "dense", blocked or "asked for by name")
    if spec.backend in ("auto", "torch"):
        plan = _torch_plan(spec, inputs)
        if plan is not None:
            return plan
    if spec.backend in ("cpp", "triton"):
        raise RuntimeError(f"backend={spec.backend!r} is not usable here: {_MISSING}")
    return Plan("reference", "dense", f"{_not_factored(spec, inputs)}; {_MISSING}")


_MISSING = "no fused kernels for pairs are installed"


def _torch_plan(spec: LossSpec, inputs: Inputs) -> Plan | None:
    """The factored form where it exists and pays, or was asked for."""
    asked = spec.algorithm == "factored"
    unsupported = factored.unsupported(spec, inputs.pair_mask is not None)
    if asked or spec.backend == "torch":
        if unsupported:
            raise RuntimeError(f"algorithm='factored' is not usable here: {unsupported}")
        if spec.algorithm not in ("auto", "factored"):
            raise RuntimeError(
                f"algorithm={spec.algorithm!r} is not usable here: backend='torch' is 'factored'"
            )
        return Plan("torch", "factored", "asked for by name")
    if spec.algorithm == "auto" and not unsupported and _factored_pays(inputs):
        return Plan("torch", "factored", "linear in the inner product, and many items per feature")
    return None


def _factored_pays(inputs: Inputs) -> bool:
    """Whether 2 Q K / (Q + K), the harmonic mean of the sides, is large against D."""
    queries, keys = inputs.student.shape[1], inputs.num_keys
    length = inputs.student.shape[2] + inputs.teacher.shape[2]
    threshold = FACTORED_FROM.get(inputs.student.device.type, 4.0)
    return 4 * queries * keys >= threshold * length * (queries + keys)


def _not_factored(spec: LossSpec, inputs: Inputs) -> str:
    unsupported = factored.unsupported(spec, inputs.pair_mask is not None)
    return unsupported or "too few items per feature for the factored form"


def _reference_only(spec: LossSpec, inputs: Inputs) -> str | None:
    """Why only the reference can compute this call, or None."""
    for component in (spec.affinity, spec.normalization, spec.loss):
        if not component.builtin:
            return f"{component.kind} {component.name!r} is registered by the user"
    if not spec.detach_teacher:
        return "detach_teacher=False needs the teacher's gradient"
    if inputs.row_weight is not None and inputs.row_weight.requires_grad:
        return "row_weight requires grad"
    if inputs.student.device.type == "meta":
        return "meta tensors have no values"
    if in_functorch():
        return "a torch.func transform is active"
    return None


def in_functorch() -> bool:
    """Whether a torch.func transform is active (and not being traced, which sees through it)."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())
