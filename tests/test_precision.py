"""The precision of float32 products follows both of torch's settings, and the newer one wins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from affkd_kernels.kernels.precision import float32_precision

matmul = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def settings_of_a_fresh_process() -> Iterator[None]:
    reset()
    yield
    reset()


def reset() -> None:
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "none"


def test_products_are_exact_by_default() -> None:
    assert float32_precision() == "ieee"


@pytest.mark.parametrize("setting, expected", [("high", "tf32x3"), ("medium", "tf32")])
def test_the_older_setting(setting: str, expected: str) -> None:
    torch.set_float32_matmul_precision(setting)
    assert float32_precision() == expected
    torch.set_float32_matmul_precision("highest")
    assert float32_precision() == "ieee"


@pytest.mark.parametrize("setting, expected", [("tf32", "tf32"), ("ieee", "ieee")])
def test_the_newer_setting(setting: str, expected: str) -> None:
    matmul.fp32_precision = setting
    assert float32_precision() == expected


def test_the_newer_setting_alone_makes_the_older_one_unreadable() -> None:
    """The reason for the except clause; where this fails, it has become unreachable."""
    matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()


@pytest.mark.parametrize("older", ["high", "medium"])
def test_the_newer_setting_wins(older: str) -> None:
    torch.set_float32_matmul_precision(older)
    matmul.fp32_precision = "ieee"
    assert float32_precision() == "ieee"


def test_it_is_read_anew_at_each_call() -> None:
    seen = []
    for setting in ("high", "highest", "medium"):
        torch.set_float32_matmul_precision(setting)
        seen.append(float32_precision())
    assert seen == ["tf32x3", "ieee", "tf32"]
