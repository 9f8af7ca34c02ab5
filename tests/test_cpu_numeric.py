"""The kernels' own exp and logarithm: within 2 units in the last place, and honest at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from affkd_kernels.kernels import cpu, extension

usable, reason = cpu.available()
pytestmark = pytest.mark.skipif(not usable, reason=reason)
CAPABILITIES = extension.usable_capabilities() if usable else []


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AFFKD_CPU_CAPABILITY", request.param)
    return request.param


def exponential(x: Tensor) -> Tensor:
    return torch.ops.affkd_kernels.cpu_exponential(x)


def log_ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.affkd_kernels.cpu_log_ratio(a, b)


def ulps(value: Tensor, exact: Tensor) -> float:
    """The largest error in units in the last place of the exact result; float64 for float32."""
    spacing = torch.finfo(value.dtype).eps * torch.exp2(exact.abs().log2().floor())
    tiny = torch.finfo(value.dtype).tiny * torch.finfo(value.dtype).eps
    return ((value.to(exact.dtype) - exact).abs() / spacing.clamp(min=tiny)).max().item()


def test_float32_exponential_is_within_two_ulp(capability: str) -> None:
    x = torch.linspace(-87.0, 88.7, 400_001)
    assert ulps(exponential(x), x.double().exp()) <= 2


def test_float64_exponential_is_within_two_ulp(capability: str) -> None:
    x = torch.linspace(-700.0, 709.0, 400_001, dtype=torch.float64)
    # the platform's own exponential is itself within one
    assert ulps(exponential(x), x.exp()) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_at_the_edges(capability: str, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, -math.inf, math.inf, math.nan, -1e30, 1e30], dtype=dtype)
    y = exponential(x)
    expected = torch.tensor([1.0, 1.0, 0.0, math.inf, math.nan, 0.0, math.inf], dtype=dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_has_no_subnormal_values(capability: str, dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).tiny
    edge = math.log(smallest)
    x = torch.linspace(edge - 30, edge + 1, 1001, dtype=dtype)
    y = exponential(x)
    assert (y[x < edge - 1e-3] == 0).all()
    assert (y[x > edge + 1e-3] >= smallest).all()
    assert ((y == 0) | (y >= smallest)).all()


def test_float32_log_ratio_is_within_two_ulp(capability: str) -> None:
    a = torch.logspace(-12, 12, 200_001)
    b = a.flip(0) * torch.linspace(0.5, 2.0, 200_001)
    exact = a.double().log() - b.double().log()
    away = exact.abs() > 1e-3
    assert ulps(log_ratio(a, b)[away], exact[away]) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratio_keeps_its_digits_where_the_arguments_nearly_agree(
    capability: str, dtype: torch.dtype
) -> None:
    b = torch.rand(10_000, dtype=dtype) + 0.1
    a = b * (1 + torch.linspace(-1e-3, 1e-3, 10_000, dtype=dtype))
    relative = (a.double() - b.double()) / b.double()
    assert ulps(log_ratio(a, b), relative.log1p()) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratio_at_the_edges(capability: str, dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, math.nan, 1.0, -1.0, 3.0], dtype=dtype)
    b = torch.tensor([1.0, 1.0, math.nan, 1.0, 3.0], dtype=dtype)
    expected = torch.tensor([0.0, math.nan, math.nan, math.nan, 0.0], dtype=dtype)
    torch.testing.assert_close(log_ratio(a, b), expected, rtol=0, atol=0, equal_nan=True)
    assert not log_ratio(torch.tensor([math.inf], dtype=dtype), a[:1]).isfinite().any()
