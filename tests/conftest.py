"""Shared by all tests: determinism, which implementations are usable, and the closing counts.

``--device cuda`` puts the tensors of all tests there. Without a GPU the Triton kernels run in
Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

# before anything imports triton, which reads it once
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore = []
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile(
        "repeatable", derandomize=True, deadline=None, max_examples=30, database=None
    )
    hypothesis.settings.load_profile("repeatable")
else:
    # a machine without network may lack it
    collect_ignore += ["test_bank.py", "test_reference_properties.py"]

# how to ask for each implementation; a test takes the `implementation` fixture and passes it on
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "reference": {"backend": "reference"},
    "factored": {"backend": "torch", "algorithm": "factored"},
    "cpp-dense": {"backend": "cpp", "algorithm": "dense"},
    "cpp-tiled": {"backend": "cpp", "algorithm": "tiled"},
    "triton-dense": {"backend": "triton", "algorithm": "dense"},
    "triton-tiled": {"backend": "triton", "algorithm": "tiled"},
}
_COUNT = "count: "


@cache
def why_unusable(name: str) -> str | None:
    """The reason the package gives for not running an implementation here, None if it runs."""
    import affkd_kernels as affkd

    try:
        affkd.affinity_loss(torch.ones(2, 1), torch.ones(2, 1), **IMPLEMENTATIONS[name])
    except RuntimeError as error:
        return str(error)
    return None


@pytest.fixture(params=list(IMPLEMENTATIONS))
def implementation(request: pytest.FixtureRequest) -> dict[str, str]:
    """The `backend` and `algorithm` arguments of every implementation, skipping unusable ones."""
    return _usable(request.param)


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if name != "reference"])
def fused(request: pytest.FixtureRequest) -> dict[str, str]:
    """The same without the reference, which the others are compared with."""
    return _usable(request.param)


def _usable(name: str) -> dict[str, str]:
    reason = why_unusable(name)
    if reason is not None:
        pytest.skip(reason)
    return IMPLEMENTATIONS[name]


@pytest.fixture(params=["eager", "compiled", "triton"])
def sweep(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What sums up the triples of RKD's angle loss outside the reference."""
    from affkd_kernels.kernels import angle
    from affkd_kernels.kernels.lookup import missing

    device = torch.get_default_device()
    if request.param == "compiled" and not angle.runs_compiled(device):
        pytest.skip(f"no compiled sweep on {device.type!r} devices")
    if request.param == "triton" and missing("triton", device.type):
        pytest.skip(str(missing("triton", device.type)))
    monkeypatch.setattr(angle, "runs_compiled", lambda device: request.param == "compiled")
    monkeypatch.setattr(angle, "runs_triton", lambda device: request.param == "triton")
    return request.param


@pytest.fixture(scope="session")
def kernels() -> Any:
    """The CUDA kernels, built for the CPU: a `cuda_host.harness.Library`."""
    from cuda_host import harness

    if (reason := harness.why_unusable()) is not None:
        pytest.skip(reason)
    return harness.Library(harness.build())


@pytest.fixture(scope="session")
def _cuda_operators(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from stand_in import StandIn, build

    return StandIn(build(tmp_path_factory.mktemp("stand_in")))


@pytest.fixture
def stand_in(_cuda_operators: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA operators on CPU tensors, with nothing behind them: a `stand_in.StandIn`."""
    from affkd_kernels.kernels import cuda

    monkeypatch.setattr(cuda, "available", lambda device_type="cuda": (True, ""))
    return _cuda_operators


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where the tests' tensors live, as in 'cuda'")


def pytest_configure(config: pytest.Config) -> None:
    # the tests' matrices are tiny, and a second thread only costs them time
    torch.set_num_threads(1)
    if config.getoption("--device"):
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Fills what the package allocates without initializing it with NaN (integers: the minimum).

    Yields the number of poisoned allocations per function, so that a test can tell whether any
    of what it ran was poisoned at all.
    """
    poisoned: Counter[str] = Counter()

    def poisoning(name: str, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            allocated = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] == "affkd_kernels" and allocated.dtype != torch.bool:
                floating = allocated.is_floating_point()
                allocated.fill_(float("nan") if floating else torch.iinfo(allocated.dtype).min)
                poisoned[name] += 1
            return allocated

        return wrapper

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoning(name, getattr(owner, name)))
    yield poisoned


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`tally("triples gradchecked")` adds to a count that the end of the run prints."""

    def add(what: str, number: int = 1) -> None:
        record_property(_COUNT + what, number)

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    # user properties travel with the reports, also from the processes of pytest-xdist
    totals: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name.startswith(_COUNT) and report.when == "call":
                totals[name.removeprefix(_COUNT)] += value
    if totals:
        from cases import valid_triples

        terminalreporter.section("coverage of the contract")
        terminalreporter.write_line(f"{len(valid_triples()):6} valid triples of component variants")
        for what, total in sorted(totals.items()):
            terminalreporter.write_line(f"{total:6} {what}")
