"""LossSpec: everything about an affinity loss that does not depend on the tensors of a call."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from dataclasses import dataclass
from typing import Any

from .components import Affinity, Loss, Normalization, Softmax, check_triple
from .components.base import parse_call
from .components.normalization import Frobenius

REDUCTIONS = ("mean", "batchmean", "matrixmean", "sum", "none")
ITEMS = ("samples", "tokens", "pixels", "channels")
DIAGONALS = ("keep", "zero", "exclude")
BACKENDS = ("auto", "reference", "torch", "cpp", "triton")
ALGORITHMS = ("auto", "dense", "tiled", "factored")


@dataclass(frozen=True)
class LossSpec:
    """A validated triple with its static options."""

    affinity: Affinity
    normalization: Normalization
    loss: Loss
    reduction: str = "mean"
    weight: float = 1.0
    items: str = "samples"
    diagonal: str = "keep"
    diagonal_offset: int | None = None
    detach_teacher: bool = True
    backend: str = "auto"
    algorithm: str = "auto"
    max_workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        check_triple(self.affinity, self.normalization, self.loss)
        _check_choice("reduction", self.reduction, REDUCTIONS)
        _check_choice("items", self.items, ITEMS)
        _check_choice("diagonal", self.diagonal, DIAGONALS)
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("algorithm", self.algorithm, ALGORITHMS)
        object.__setattr__(self, "weight", _checked_weight(self.weight))
        _check_integer("diagonal_offset", self.diagonal_offset, -_LIMIT)
        _check_integer("max_workspace_bytes", self.max_workspace_bytes, 0)
        if not isinstance(self.detach_teacher, bool):
            raise TypeError(f"detach_teacher must be True or False, got {self.detach_teacher!r}")
        if self.backend == "reference" and self.algorithm not in ("auto", "dense"):
            raise ValueError(
                f"backend='reference' is dense, got algorithm={self.algorithm!r}; "
                "valid with it: 'auto', 'dense'"
            )
        if self.axis == "both" and self.reduction == "none":
            raise ValueError("reduction='none' needs axis='row' or 'column', got axis='both'")
        if self.diagonal == "exclude" and self.whole_matrix:
            raise ValueError(
                f"diagonal='exclude' cannot go with {self.normalization}; "
                "valid with it: 'keep', 'zero'"
            )
        object.__setattr__(self, "_hash", hash(dataclasses.astuple(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        # not the cached hash: the hashes of strings differ between processes
        return LossSpec, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @property
    def axis(self) -> str:
        """The axis of the softmax; every other normalization works along rows."""
        n = self.normalization
        return n.axis if isinstance(n, Softmax) and n.builtin else "row"

    @property
    def whole_matrix(self) -> bool:
        """Whether single pairs cannot be left out: centering, and a softmax over columns."""
        n = self.normalization
        centered = isinstance(n, Frobenius) and n.builtin and n.center
        return centered or self.axis != "row"

    @property
    def builtin(self) -> bool:
        """Whether all three components are the contract's own, which the kernels know."""
        return self.affinity.builtin and self.normalization.builtin and self.loss.builtin

    def encode(self) -> str:
        """The mathematical part as text, so that a compiled graph can carry it."""
        options = (
            f"options(reduction={self.reduction!r}, weight={self.weight!r}, "
            f"diagonal={self.diagonal!r}, diagonal_offset={self.diagonal_offset!r}, "
            f"max_workspace_bytes={self.max_workspace_bytes!r})"
        )
        return "; ".join((str(self.affinity), str(self.normalization), str(self.loss), options))


@functools.lru_cache(maxsize=512)
def decode(text: str) -> LossSpec:
    """The inverse of :meth:`LossSpec.encode`."""
    affinity, normalization, loss, options = text.split("; ")
    return make_spec(affinity, normalization, loss, **parse_call(options)[1])


def make_spec(
    affinity: Affinity | str, normalization: Normalization | str, loss: Loss | str, **options: Any
) -> LossSpec:
    """Resolve the shorthands and validate; cached, because training calls repeat themselves."""
    try:
        return _cached_spec(affinity, normalization, loss, **options)
    except TypeError:
        # also what an unhashable argument gives, and then the text would not name it
        return _new_spec(affinity, normalization, loss, **options)


def _new_spec(
    affinity: Affinity | str, normalization: Normalization | str, loss: Loss | str, **options: Any
) -> LossSpec:
    valid = [field.name for field in dataclasses.fields(LossSpec)[3:]]
    for option in options:
        if option not in valid:
            raise TypeError(f"unknown option {option!r}; valid options: {', '.join(valid)}")
    return LossSpec(
        Affinity.resolve(affinity),
        Normalization.resolve(normalization),
        Loss.resolve(loss),
        **options,
    )


_cached_spec = functools.lru_cache(maxsize=512, typed=True)(_new_spec)


class _Traced:
    """Specs made while torch.compile traces, as attributes: the tracer reads those afresh."""


_traced = _Traced()


def traced_spec(*args: Any, **options: Any) -> LossSpec:
    """:func:`make_spec` for code under ``torch.compile``.

    The resolution (parsing, validation) happens while tracing. The spec is read from a global
    afterwards, because the tracer sees through the attributes of objects that it can find again.
    """
    return getattr(_traced, _intern(*args, **options))


def _intern(*args: Any, **options: Any) -> str:
    spec = make_spec(*args, **options)
    known = [name for name, other in vars(_traced).items() if other == spec]
    name = known[0] if known else f"spec_{len(vars(_traced))}"
    setattr(_traced, name, spec)
    return name


# torch.compiler.assume_constant_result sets just this, but imports the whole compiler for it
_intern._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_choice(option: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _checked_weight(weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
        raise TypeError(f"weight must be a float, got {type(weight).__name__}")
    if not math.isfinite(weight):
        raise ValueError(f"weight must be finite, got {weight}")
    return float(weight)


_LIMIT = 2**62


def _check_integer(option: str, value: Any, at_least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} must be an integer or None, got {value!r}")
    if not at_least <= value <= _LIMIT:
        raise ValueError(f"{option} must lie in [{at_least}, {_LIMIT}], got {value}")
