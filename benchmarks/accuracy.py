"""The error of loss and gradient against float64, and whether it is small enough to be reported."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunked import RECIPES, chunked_loss
from .inputs import CaseInputs
from .providers import Provider
from .registry import METHODS, Case

# no larger than this many times the baseline's own error, plus a rounding
ALLOWED_RATIO, ALLOWED_EXTRA = 2.0, 1e-6

# entries of a matrix up to which the eager form in float64 fits and ends
EAGER_TRUTH_UP_TO = 8192**2
# and up to which a chunked one ends
CHUNKED_TRUTH_UP_TO = 65536**2


@dataclass(frozen=True)
class Error:
    """Relative to float64: |loss - truth| / |truth|, and the same in norms for the gradients."""

    loss: float
    gradient: float

    def within(self, baseline: Error) -> bool:
        """Whether it is at most the allowed multiple of the baseline's."""
        pairs = ((self.loss, baseline.loss), (self.gradient, baseline.gradient))
        return all(own <= ALLOWED_RATIO * other + ALLOWED_EXTRA for own, other in pairs)


def truth_form(case: Case) -> Provider | None:
    """The independent form that is evaluated in float64: eager where it can run at all."""
    method = METHODS[case.method]
    matrices, queries, keys, _ = case.extent
    entries = matrices * queries * keys
    if entries <= EAGER_TRUTH_UP_TO:
        return Provider("eager", method.eager)
    if "features" in method.variants:
        return Provider("eager-features", method.variants["features"])
    if case.method in RECIPES and entries <= CHUNKED_TRUTH_UP_TO:
        recipe = RECIPES[case.method]
        return Provider("chunked", lambda *args, **options: chunked_loss(recipe, *args, **options))
    return None


def true_values(case: Case, inputs: CaseInputs) -> tuple[Tensor, ...] | None:
    """Loss and gradients in float64, on the CPU or wherever the inputs are."""
    form = truth_form(case)
    return None if form is None else form.step(inputs.to(torch.float64))


def error_of(values: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> Error:
    """The error of (loss, gradients)."""
    squared = sum((x.double() - y).square().sum().item() for x, y in _gradients(values, truth))
    size = sum(y.square().sum().item() for y in truth[1:])
    loss = abs(values[0].item() - truth[0].item()) / max(abs(truth[0].item()), 1e-300)
    return Error(loss, math.sqrt(squared) / max(math.sqrt(size), 1e-300))


def _gradients(
    values: tuple[Tensor, ...], truth: tuple[Tensor, ...]
) -> list[tuple[Tensor, Tensor]]:
    return list(zip(values[1:], truth[1:], strict=True))
