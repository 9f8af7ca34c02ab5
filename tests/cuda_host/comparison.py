"""The CUDA kernels on a CPU and the reference: one call to both, and how far apart they are."""

from __future__ import annotations

from typing import Any

import torch
from case_inputs import Inputs
from cases import Part, Triple
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.functional import PER_CALL
from affkd_kernels.inputs import canonical_inputs, from_items
from affkd_kernels.kernels.result import Needs
from affkd_kernels.spec import make_spec

from . import harness

GRADIENTS = ("student", "student_keys", "student_scale")
# every kind of affinity, normalization and loss once
SAMPLE = [
    Triple(Part(a), Part(n, o), Part(loss))
    for a, n, o, loss in (
        ("gram", "row_l2", (), "mse"),
        ("gram", "frobenius", (("center", True),), "mse"),
        ("cosine", "frobenius", (("center", True),), "l1"),
        ("cosine", "frobenius", (), "mse"),
        ("sqeuclidean", "max", (), "mse"),
        ("euclidean", "mean", (), "smooth_l1"),
        ("rbf", "row_sum", (), "kl"),
        ("polynomial", "row_l1", (), "smooth_l1"),
        ("gram", "softmax", (), "kl"),
        ("cosine", "softmax", (("axis", "column"),), "cross_entropy"),
    )
]


def with_kernels(
    kernels: harness.Library, inputs: Inputs, triple: Triple, **how: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss, or the row losses, and the gradients of their sum."""
    per_call = {k: v for k, v in inputs.options.items() if k in PER_CALL}
    static = {k: v for k, v in inputs.options.items() if k not in PER_CALL}
    spec = make_spec(*triple.build(), **static)
    canonical, shape = canonical_inputs(spec, *inputs.features, **per_call)
    wanted = [name == "student" or name in inputs.options for name in GRADIENTS]
    result = kernels.loss_and_grad(spec, canonical, Needs(*wanted), **how)
    gradients = [
        gradient if name == "student_scale" else from_items(gradient, like.shape, spec.items)
        for name, gradient in zip(GRADIENTS, result[1:], strict=True)
        if gradient is not None
        for like in (inputs.student if name == "student" else inputs.options[name],)
    ]
    if spec.reduction != "none":
        return result.loss, gradients
    launches = kernels.launches
    rows = kernels.row_losses(spec, canonical, **how).reshape(shape)
    kernels.launches = launches
    return rows, gradients


def with_reference(inputs: Inputs, triple: Triple) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs, leaves = inputs.with_grad()
    value = affkd.affinity_loss(
        *inputs.features, *triple.build(), **inputs.options, backend="reference"
    )
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


def distance(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|, or |x - y| / 1e-5 where y is smaller: many gradients vanish identically."""
    scale = y.double().norm().clamp(min=1e-5)
    return float((x.double() - y.double()).norm() / scale)


def compare(
    kernels: harness.Library, inputs: Inputs, triple: Triple, tolerance: float, **how: Any
) -> None:
    value, gradients = with_kernels(kernels, inputs, triple, **how)
    exact, exact_gradients = with_reference(inputs.to(torch.float64), triple)
    assert value.shape == exact.shape
    assert distance(value, exact) < tolerance, (str(triple), kernels.launches)
    for x, y in zip(gradients, exact_gradients, strict=True):
        assert x.shape == y.shape
        assert distance(x, y) < 100 * tolerance, (str(triple), kernels.launches)


def noise(inputs: Inputs, triple: Triple, epsilon: float) -> list[float]:
    """What rounding the features to a relative `epsilon` does to the loss and to each gradient."""

    def rounded(x: Tensor) -> Tensor:
        ripple = torch.linspace(0, x.numel(), x.numel(), dtype=x.dtype).cos()
        return x * (1 + epsilon * ripple.view(x.shape))

    inputs = inputs.to(torch.float64)
    exact, exact_gradients = with_reference(inputs, triple)
    value, gradients = with_reference(inputs.map(rounded), triple)
    before, after = (exact, *exact_gradients), (value, *gradients)
    return [distance(x, y) for x, y in zip(after, before, strict=True)]


def compare_with_eager(
    kernels: harness.Library, inputs: Inputs, triple: Triple, allowed: float = 4, **how: Any
) -> None:
    """At most `allowed` times the error of eager float32 and of rounded features, plus 32 ulp.

    The calls are tiny, and eager's own error, a single draw, is now and then next to nothing.
    """
    value, gradients = with_kernels(kernels, inputs, triple, **how)
    exact, exact_gradients = with_reference(inputs.to(torch.float64), triple)
    eager, eager_gradients = with_reference(inputs.to(torch.float32), triple)
    rounding = noise(inputs, triple, 2.0**-24)
    results = zip(
        (value, *gradients), (exact, *exact_gradients), (eager, *eager_gradients), rounding,
        strict=True,
    )  # fmt: skip
    for x, y, z, unavoidable in results:
        if y.norm() < 1e-9:
            # it vanishes identically
            assert x.norm() < 1e-6, str(triple)
            continue
        assert distance(x, y) <= allowed * (distance(z, y) + unavoidable) + 32 * 2.0**-23, str(
            triple
        )
