"""What would run on a GPU: plans are made of metadata, so none is needed to look at them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import affkd_kernels as affkd
from affkd_kernels import dispatch

PKT = ("cosine(shifted=True)", "row_sum", "kl")
SP = ("gram", "row_l2", "mse")


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Pretends that all kernels are there, but those a test enters here with a reason."""
    reasons: dict[str, str] = {}
    monkeypatch.setattr(dispatch, "missing", lambda backend, device: reasons.get(backend))
    dispatch._warn_once.cache_clear()
    yield reasons


def plan(items: int, length: int, *triple: str, **options: Any) -> dispatch.Plan:
    """The plan for [items, length] features on a CUDA device that need not exist."""
    dtype, keys = options.pop("dtype", torch.float32), options.pop("keys", 0)
    with FakeTensorMode():
        student = torch.empty(items, length, dtype=dtype, device="cuda")
        if keys:
            options["student_keys"] = options["teacher_keys"] = student.new_empty(keys, length)
        return affkd.explain_plan(student, student, *(triple or PKT), **options)


@pytest.mark.parametrize(
    ("items", "length", "expected"),
    [
        (64, 64, "cpp/dense"),
        (256, 512, "cpp/dense"),
        (1024, 512, "triton/dense"),
        (4096, 512, "triton/dense"),
        (8192, 64, "triton/tiled"),
        (32768, 512, "triton/tiled"),
    ],
)
def test_the_size_decides(absent: Any, items: int, length: int, expected: str) -> None:
    found = plan(items, length)
    assert f"{found.backend}/{found.algorithm}" == expected
    assert "estimated, not yet measured" in found.reason


def test_many_items_of_a_linear_affinity_are_factored(absent: Any) -> None:
    assert plan(1 << 20, 512, *SP)[:2] == ("torch", "factored")
    assert plan(32768, 512, *SP)[:2] == ("torch", "factored")
    # many items per feature, and yet few enough that launches decide
    assert plan(2048, 64, *SP)[:2] == ("triton", "dense")
    assert plan(1 << 20, 512, *PKT).algorithm == "tiled"


def test_a_workspace_decides_whether_the_matrices_are_held(absent: Any) -> None:
    bytes_held = 2 * 4096**2 * 4
    assert plan(4096, 512, max_workspace_bytes=bytes_held).algorithm == "dense"
    assert plan(4096, 512, max_workspace_bytes=bytes_held - 1).algorithm == "tiled"
    # a GPU holds all matrices of a batch at once
    with FakeTensorMode():
        tokens = torch.empty(64, 1024, 32, device="cuda")
        batch = affkd.explain_plan(tokens, tokens, *PKT, items="tokens")
    assert batch.algorithm == "tiled"


def test_keys_count_as_columns(absent: Any) -> None:
    assert plan(64, 128, "cosine", "softmax", "kl", keys=1024).backend == "cpp"
    assert plan(256, 128, "cosine", "softmax", "kl", keys=65536)[:2] == ("triton", "dense")


def test_float64_takes_the_kernels_made_for_it(absent: Any) -> None:
    assert plan(4096, 512, dtype=torch.float64).backend == "cpp"


@pytest.mark.parametrize(("gone", "items"), [("cpp", 64), ("triton", 4096)])
def test_a_missing_backend_is_passed_over_with_one_warning(
    absent: dict[str, str], gone: str, items: int
) -> None:
    absent[gone] = f"{gone} was not built"
    other = {"cpp": "triton", "triton": "cpp"}[gone]
    with pytest.warns(UserWarning, match=f"{gone} was not built"):
        assert plan(items, 512).backend == other
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan(items, 512).backend == other
    with pytest.raises(RuntimeError, match=f"{gone} was not built"):
        plan(items, 512, backend=gone)


def test_without_kernels_the_reference_says_what_is_missing(absent: dict[str, str]) -> None:
    absent.update(cpp="no compiler", triton="no triton")
    with pytest.warns(UserWarning, match="no compiler; no triton"):
        found = plan(64, 64)
    assert found[:2] == ("reference", "dense") and "no compiler" in found.reason
    # the factored form is plain PyTorch, and then pays from fewer items
    assert plan(2048, 64, *SP)[:2] == ("torch", "factored")
    with pytest.raises(RuntimeError, match="no triton"):
        plan(64, 64, algorithm="tiled")


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
def test_what_is_asked_for_by_name_runs(absent: Any, backend: str, algorithm: str) -> None:
    found = plan(64, 64, backend=backend, algorithm=algorithm)
    assert found == (backend, algorithm, "asked for by name")
    assert plan(1 << 20, 512, *SP, backend=backend)[:2] == (backend, "tiled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_gpu_that_is_not_here_is_planned_for() -> None:
    assert plan(4096, 512)[:2] == ("triton", "dense")
    assert plan(64, 64, backend="cpp").backend == "cpp"


def test_other_devices_have_what_they_have() -> None:
    assert dispatch.missing("cpp", "xpu") == "there are no cpp kernels for 'xpu' devices"
    assert "no fused kernels for pairs on 'mps'" in str(dispatch.fused_missing("mps"))
