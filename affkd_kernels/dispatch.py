"""Which backend and algorithm computes a call: from metadata alone, never from values."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch

from .inputs import Inputs, has_tangent
from .kernels import factored
from .kernels.lookup import missing
from .spec import LossSpec


class Plan(NamedTuple):
    """What will run, and why."""

    backend: str
    algorithm: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}/{self.algorithm}: {self.reason}"


# the fused backends of a device, as "auto" tries them
FUSED = {"cpu": ("cpp",), "cuda": ("cpp", "triton"), "xpu": ("triton",)}
# `factored` costs O(B D^2) and everything else O(B^2 D): it pays from this many items per feature,
# against the fused kernels and against the reference; `python -m benchmarks.crossover` measures it
FACTORED_FROM = {"fused": 12.0, "reference": 2.0}
# and, on a GPU, not below this many items, where its launches cost more than all pairs: estimated
FACTORED_ITEMS = {"cuda": 8192}
# the bytes that `dense` may hold: student and teacher affinity of the matrices in flight
DENSE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# the same of features no longer than SHORT, whose products a CPU computes again sooner than it
# fetches them from memory; those of longer ones it does not, and there the bound is one of memory
SHORT = 128
DENSE_BYTES_SHORT = {"cpu": 28 << 20}
# N Q K D up to which a GPU computes the products in about the time of a launch: estimated
LAUNCH_BOUND = 1 << 25


def make_plan(spec: LossSpec, inputs: Inputs) -> Plan:
    """The plan for canonical inputs.

    Raises:
        RuntimeError: a backend or algorithm asked for by name that is not usable here, and why.
        ``backend="auto"`` with ``algorithm="auto"`` never raises.
    """
    blocked = reference_only(spec, inputs)
    if blocked or spec.backend == "reference":
        if spec.backend not in ("auto", "reference") or spec.algorithm not in ("auto", "dense"):
            _refuse(spec, f"{blocked}; use backend='reference'")
        return Plan("reference", "dense", blocked or "asked for by name")
    device = inputs.student.device.type
    asked = spec.backend in ("cpp", "triton")
    fused = missing(spec.backend, device) if asked else fused_missing(device)
    if asked and fused:
        _refuse(spec, fused)
    factored_plan = _factored_plan(spec, inputs, fused is None)
    if factored_plan is not None:
        return factored_plan
    if fused is None:
        return _fused_plan(spec, inputs)
    if spec.algorithm == "tiled":
        _refuse(spec, fused)
    return Plan("reference", "dense", fused)


def _refuse(spec: LossSpec, reason: str) -> None:
    raise RuntimeError(
        f"backend={spec.backend!r}, algorithm={spec.algorithm!r} is not usable here: {reason}"
    )


def reference_only(spec: LossSpec, inputs: Inputs) -> str | None:
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
    if has_tangent(inputs):
        return "the fused kernels have no forward-mode derivative"
    return None


def in_functorch() -> bool:
    """Whether a torch.func transform is active (and not being traced, which sees through it)."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def _factored_plan(spec: LossSpec, inputs: Inputs, has_fused: bool) -> Plan | None:
    """The factored form where it was asked for, or exists and pays."""
    unsupported = factored.unsupported(spec, inputs.pair_mask is not None)
    if spec.algorithm == "factored" or spec.backend == "torch":
        if spec.algorithm not in ("auto", "factored") or spec.backend not in ("auto", "torch"):
            _refuse(spec, "algorithm='factored' is backend='torch', which has no other")
        if unsupported:
            _refuse(spec, f"no factored form: {unsupported}")
        return Plan("torch", "factored", "asked for by name")
    if spec.algorithm != "auto" or spec.backend != "auto" or unsupported:
        return None
    threshold = FACTORED_FROM["fused" if has_fused else "reference"]
    fewest = FACTORED_ITEMS.get(inputs.student.device.type, 0) if has_fused else 0
    if not _many_items_per_feature(inputs, threshold) or inputs.student.shape[1] < fewest:
        return None
    return Plan("torch", "factored", "linear in the inner product, and many items per feature")


def _many_items_per_feature(inputs: Inputs, threshold: float) -> bool:
    """Whether 2 Q K / (Q + K), the harmonic mean of the sides, is at least threshold * D."""
    queries, keys = inputs.student.shape[1], inputs.num_keys
    length = inputs.student.shape[2] + inputs.teacher.shape[2]
    return bool(4 * queries * keys >= threshold * length * (queries + keys))


def _fused_plan(spec: LossSpec, inputs: Inputs) -> Plan:
    algorithm, reason = spec.algorithm, "asked for by name"
    if algorithm == "auto":
        fits = _dense_bytes(inputs) <= _workspace(spec, inputs)
        algorithm = "dense" if fits else "tiled"
        reason = f"the affinity matrices {'fit' if fits else 'would not fit'} the workspace"
    if spec.backend != "auto":
        return Plan(spec.backend, algorithm, reason)
    backend, why = _fused_backend(inputs, algorithm)
    return Plan(backend, algorithm, f"{reason}; {why}" if why else reason)


def _dense_bytes(inputs: Inputs) -> int:
    """What `dense` holds: a CPU works on a matrix per thread, a GPU on all at once."""
    matrices = inputs.student.shape[0]
    if inputs.student.device.type == "cpu":
        matrices = min(matrices, num_threads())
    return int(2 * matrices * inputs.student.shape[1] * inputs.num_keys * inputs.dtype.itemsize)


def _workspace(spec: LossSpec, inputs: Inputs) -> int:
    if spec.max_workspace_bytes is not None:
        return spec.max_workspace_bytes
    device = inputs.student.device.type
    short = inputs.student.shape[2] + inputs.teacher.shape[2] <= 2 * SHORT
    if short and device in DENSE_BYTES_SHORT:
        return DENSE_BYTES_SHORT[device]
    return DENSE_BYTES.get(device, DENSE_BYTES["cuda"])


def _fused_backend(inputs: Inputs, algorithm: str) -> tuple[str, str]:
    """The backend that "auto" takes, and why, where there is a choice."""
    device = inputs.student.device.type
    if len(FUSED[device]) == 1:
        return FUSED[device][0], ""
    best, why = _best_on_gpu(inputs, algorithm)
    absent = missing(best, device)
    if absent is None:
        return best, f"{why} (estimated, not yet measured)"
    _warn_once(f"affkd_kernels would take {best} kernels for some losses, {why}: {absent}")
    other = next(name for name in FUSED[device] if name != best)
    return other, f"{best} kernels are missing"


def _best_on_gpu(inputs: Inputs, algorithm: str) -> tuple[str, str]:
    if inputs.dtype == torch.float64:
        return "cpp", "made for float64"
    products = inputs.num_pairs * inputs.student.shape[2]
    if algorithm == "dense" and products <= LAUNCH_BOUND:
        return "cpp", "fewest launches where launches decide"
    return "triton", "tensor cores where products decide"


def fused_missing(device: str) -> str | None:
    """Why no fused kernels for pairs run on this device, or None where they do."""
    reasons: list[str] = []
    for backend in FUSED.get(device, ()):
        reason = missing(backend, device)
        if reason is None:
            return None
        reasons.append(reason)
    if not reasons:
        return f"there are no fused kernels for pairs on {device!r} devices"
    reason = "; ".join(reasons)
    _warn_once(f"affkd_kernels computes some losses on the slower reference path: {reason}")
    return reason


def num_threads() -> int:
    return torch.get_num_threads()


# a constant of a compiled graph; see spec._intern
num_threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(message, stacklevel=2)
