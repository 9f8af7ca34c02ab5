"""Which weight? An answer from gradients instead of from a grid search."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["suggest_weight"]


def suggest_weight(
    term_loss: Tensor, main_loss: Tensor, at: Tensor | Iterable[Tensor], share: float = 1.0
) -> float:
    """The weight at which a term pulls with a given share of the main loss's force.

    `weight = share * |d main_loss / d at| / |d term_loss / d at|`, with the Euclidean norm over all
    of `at`. Equal loss values say little: a relational loss may be large and flat, or tiny and
    steep, and several shrink as the batch grows. The figure belongs to the batch it was measured
    on; take the median over some batches, after the first epochs rather than at the start.

    The graph of both losses is kept, so the training step can go on with its `backward()`, and no
    `.grad` is touched.

    Args:
        term_loss: 0-dim tensor, the term with the weight it has now (usually 1).
        main_loss: 0-dim tensor, what the term is to be compared with, such as the cross-entropy.
        at: where to compare: a feature both losses depend on, or parameters
            (`model.parameters()`, `model.layer3.parameters()`). Tensors that do not require grad
            are passed over, and one that a loss does not reach counts as zero for it.
        share: the wanted ratio of the two gradient norms; 1.0 makes them equal.

    Returns:
        The factor to multiply `term_loss` by. It waits for the device.

    Raises:
        TypeError, ValueError: a loss that is no scalar or has no graph, nothing to compare at, or
            a gradient that is zero, infinite or NaN (the message says which loss's).

    Example::

        weight = suggest_weight(sp(features, teacher), cross_entropy, at=features, share=0.5)
    """
    share = _checked_share(share)
    tensors = [at] if isinstance(at, Tensor) else list(at)
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    if not tensors:
        raise ValueError("at must hold a tensor that requires grad, got none")
    main = _gradient_norm("main_loss", main_loss, tensors)
    return share * main / _gradient_norm("term_loss", term_loss, tensors)


def _checked_share(share: Any) -> float:
    if isinstance(share, bool) or not isinstance(share, numbers.Real):
        raise TypeError(f"share must be a positive number, got {type(share).__name__}")
    value = float(share)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"share must be a positive number, got {share}")
    return value


def _gradient_norm(name: str, loss: Tensor, at: list[Tensor]) -> float:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(loss).__name__}")
    if loss.ndim != 0:
        raise ValueError(f"{name} must be a 0-dim tensor, got shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(f"{name} must have a graph to differentiate, got a constant")
    gradients = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
    reached = [gradient for gradient in gradients if gradient is not None]
    if not reached:
        raise ValueError(f"{name} must depend on a tensor of `at`, got a loss that reaches none")
    # squares of half-precision gradients would overflow, and small ones vanish
    squares = [gradient.double().square().sum().to(reached[0].device) for gradient in reached]
    norm = math.sqrt(float(torch.stack(squares).sum()))
    if norm == 0:
        raise ValueError(
            f"{name} must have a gradient to compare, got one that is exactly zero at `at`: "
            "student and teacher agree, the batch has collapsed, or the graph is cut"
        )
    if not math.isfinite(norm):
        raise ValueError(f"{name} must have a finite gradient at `at`, got norm {norm}")
    return norm
