"""A machine that cannot build Triton's launcher, or keep its kernels, takes the next backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from affkd_kernels import dispatch
from affkd_kernels.kernels import triton as kernels

pytest.importorskip("triton")

from triton.runtime import build, driver  # noqa: E402

from affkd_kernels.kernels.triton import toolchain  # noqa: E402


class Driver:
    """Stands for Triton's driver of a GPU."""

    def __init__(self, build_utils: Callable[[], Any]) -> None:
        self._build = build_utils

    @property
    def utils(self) -> Any:
        return self._build()


class Utils:
    launch = None


@pytest.fixture
def set_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return lambda make: monkeypatch.setattr(driver, "_active", Driver(make))


def test_nothing_is_missing_where_the_launcher_loads(set_driver: Any) -> None:
    set_driver(Utils)
    assert toolchain.missing() is None


def test_a_compiler_that_fails(set_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    set_driver(lambda: build.compile_module_from_src(src="", name="launcher"))
    reason = str(toolchain.missing())
    assert "C compiler and Python's headers" in reason and "false" in reason


def test_an_older_triton_without_a_compiler(
    set_driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_driver(object)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "neither gcc nor clang" in str(toolchain.missing())
    monkeypatch.setenv("CC", "cc")
    assert toolchain.missing() is None


def test_a_cache_that_takes_no_files(
    set_driver: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_driver(Utils)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "TRITON_CACHE_DIR" in str(toolchain.missing())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.parametrize("reason", [None, "no compiler"])
def test_the_backend_says_what_is_missing(
    gpu: None, monkeypatch: pytest.MonkeyPatch, reason: str | None
) -> None:
    monkeypatch.setattr(toolchain, "missing", lambda: reason)
    assert kernels.available.__wrapped__("cuda") == (reason is None, reason or "")


def test_triton_is_asked_about_only_where_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer takes a compiler's second."""
    asked: list[str] = []

    def missing(backend: str, device: str) -> str | None:
        asked.append(backend)
        return None

    monkeypatch.setattr(dispatch, "missing", missing)
    assert dispatch.fused_missing("cuda") is None
    assert asked == ["cpp"]
