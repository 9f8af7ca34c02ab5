"""Features of several dtypes in one call, and far from the origin, in Triton's interpreter."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from case_inputs import Inputs, bank, mask, pair
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.kernels import triton as kernels

pytest.importorskip("triton")
if not kernels.available("cpu")[0]:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
EUCLIDEAN = ("euclidean", "mean", "smooth_l1")
CKA = ("gram", "frobenius(center=True)", "mse")
TRIPLES = (
    EUCLIDEAN,
    ("rbf(gamma=0.05, unit=False)", "row_sum", "kl"),
    CKA,
    ("cosine", "softmax(tau=0.5)", "kl"),
)
Dtypes = tuple[torch.dtype, torch.dtype]


def features(kind: str, offset: float, queries: Dtypes, keys: Dtypes) -> Inputs:
    """A masked call, every feature rounded to its dtype."""
    if kind == "self":
        made = pair(7, 19, 8, teacher_dim=9, mask=mask(4, 19))
    else:
        made = bank(7, 19, 8, keys=18, teacher_dim=9, key_mask=mask(3, 18))
    made = made.map(lambda x: 2 * x + offset)
    options = dict(made.options)
    if kind == "cross":
        for side, dtype in zip(("student_keys", "teacher_keys"), keys, strict=True):
            options[side] = options[side].to(dtype)
    student, teacher = (x.to(dtype) for x, dtype in zip(made.features, queries, strict=True))
    return replace(made, student=student, teacher=teacher, options=options)


def results(inputs: Inputs, triple: tuple[str, str, str], **how: str) -> list[Tensor]:
    """The loss and the gradients of the student's features."""
    inputs, leaves = inputs.with_grad()
    value = affkd.affinity_loss(*inputs.features, *triple, **inputs.options, **how)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def compare(inputs: Inputs, triple: tuple[str, str, str], algorithm: str) -> None:
    """No more than twice the error of the eager form, but for the rounding of the result."""
    ours = results(inputs, triple, backend="triton", algorithm=algorithm)
    eager = results(inputs, triple, backend="reference")
    exact = results(inputs.to(torch.float64), triple, backend="reference")
    for x, y, truth in zip(ours, eager, exact, strict=True):
        assert x.dtype == y.dtype
        # in float64 the eager form is itself the truth, and a float32 number anywhere is 1e-7
        rounding = max(4 * torch.finfo(x.dtype).eps, 2e-8)
        allowed = 2 * (y.double() - truth).norm() + rounding * truth.norm()
        assert (x.double() - truth).norm() <= allowed, (triple, [str(t.dtype) for t in ours])


@pytest.mark.parametrize("algorithm, kind", [("dense", "self"), ("tiled", "cross")])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_any_dtypes_meet(offset: float, algorithm: str, kind: str) -> None:
    every = list(itertools.product(DTYPES, repeat=2))
    for number, queries in enumerate(every):
        keys = every[(5 * number + 3) % len(every)]
        triple = TRIPLES[(number + number // len(TRIPLES)) % len(TRIPLES)]
        compare(features(kind, offset, queries, keys), triple, algorithm)


@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_common_offset_does_not_hurt_what_it_does_not_change(
    kind: str, dtype: torch.dtype, algorithm: str
) -> None:
    """Features of half precision, whose differences from their mean float32 has room for."""
    both = (dtype, dtype)
    for triple in (EUCLIDEAN, CKA):
        compare(features(kind, 100.0, both, both), triple, algorithm)
