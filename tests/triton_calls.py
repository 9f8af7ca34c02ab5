"""Calls of the Triton kernels in Triton's interpreter; what imports this is skipped without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels import triton as kernels
from affkd_kernels.kernels.result import LossAndGrad, Needs
from affkd_kernels.spec import make_spec

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if not kernels.available("cpu")[0]:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


def evaluate(inputs: Any, triple: tuple[str, str, str], algorithm: str, **options: Any) -> Any:
    tensors = {k: v for k, v in inputs.options.items() if isinstance(v, Tensor)}
    static = {k: v for k, v in inputs.options.items() if k not in tensors}
    spec = make_spec(*triple, **static, **options)
    canonical, _ = canonical_inputs(spec, *inputs.features, **tensors)
    needs = Needs(student=True, student_keys="student_keys" in tensors)
    return kernels.loss_and_grad(spec, canonical, needs, algorithm)


def assert_close(ours: LossAndGrad, expected: LossAndGrad, tolerance: float) -> None:
    for x, y in zip(ours, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
