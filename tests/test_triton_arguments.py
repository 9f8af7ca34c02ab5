"""Arguments that lie in memory for the driver are those that a kernel was called with."""

from __future__ import annotations

import ctypes
import threading
import time
import types
from typing import Any

import pytest

pytest.importorskip("triton")

from affkd_kernels.kernels.triton import arguments  # noqa: E402
from affkd_kernels.kernels.triton.arguments import (  # noqa: E402
    Address,
    Launch,
    PreparedLaunches,
    can_prepare,
)

SIGNATURE = {
    "x": "*fp32",
    "count": "i32",
    "side": ("*fp64", "i64", "constexpr"),
    "weight": "fp64",
    "nothing": "*i1",
    "HOW": "constexpr",
}
ARGUMENTS = (Address(1), -5, (Address(0), 1 << 40, 1), -0.1, 0, "rows")
READ_AS = (
    ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_double,
    ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64,
)  # fmt: skip


def launch(
    signature: Any = SIGNATURE, values: Any = ARGUMENTS, parameters: int = 8, **metadata: Any
) -> Launch:
    plain = {
        "target": types.SimpleNamespace(backend="cuda", warp_size=32),
        **{"num_ctas": 1, "num_warps": 8, "shared": 4096, "global_scratch_size": 0},
    }
    compiled = types.SimpleNamespace(
        metadata=types.SimpleNamespace(**{**plain, **metadata}),
        src=types.SimpleNamespace(signature=signature),
        asm={
            "ptx": f".visible .entry gram_kernel({', '.join(['.param .u64 x'] * parameters)}) ..."
        },
        function=77,
    )
    return Launch(compiled, (6, 2, 1), values)


class Driver:
    """Stands for cuLaunchKernelEx of the launches that `launch` makes; refuses one of them."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.refused = -1

    def __call__(self, config: int, function: int, parameters: int, extra: None) -> int:
        if len(self.taken) == self.refused:
            return 201
        given = arguments._Config.from_address(config)
        at = (ctypes.c_void_p * len(READ_AS)).from_address(parameters)
        # where another thread would come in
        time.sleep(0)
        values = [kind.from_address(x).value for kind, x in zip(READ_AS, at, strict=True)]
        self.taken.append(
            (tuple(given.grid), tuple(given.block), given.shared_bytes, given.stream, function)
            + (given.attributes, given.attribute_count, extra, values)
        )
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    entry = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(driver)
    monkeypatch.setattr(arguments, "_driver", lambda: entry)
    return driver


def test_the_driver_reads_what_a_kernel_was_given(driver: Driver) -> None:
    prepared = PreparedLaunches([launch(), launch()], 2)
    assert prepared([1 << 47, 3 << 46], 9) == 2
    values = [3 << 46, -5, 1 << 47, 1 << 40, -0.1, 0, 0, 0]
    expected = ((6, 2, 1), (256, 1, 1), 4096, 9, 77, None, 0, None, values)
    assert driver.taken == [expected] * 2


def test_what_is_refused_is_told(driver: Driver) -> None:
    prepared = PreparedLaunches([launch()] * 3, 2)
    for driver.refused in range(3):
        driver.taken.clear()
        assert prepared([1, 2], 0) == len(driver.taken) == driver.refused


def test_threads_have_their_own_addresses(driver: Driver) -> None:
    prepared = PreparedLaunches([launch()] * 3, 2)
    threads = [
        threading.Thread(target=lambda k=k: [prepared([k, 10 * k], k) for _ in range(200)])  # type: ignore[misc]
        for k in (1, 2, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.taken) == 3 * 3 * 200
    for *_, stream, _, _, _, _, values in driver.taken:
        assert (values[0], values[2]) == (10 * stream, stream)


@pytest.mark.parametrize(
    "metadata",
    [
        {"target": types.SimpleNamespace(backend="hip")},
        {"num_ctas": 2},
        {"global_scratch_size": 128},
        {"profile_scratch_size": 128},
        {"launch_cooperative_grid": True},
        {"launch_pdl": True},
        {"instrumentation_mode": "gsan"},
        {"parameters": 9},
    ],
)
def test_what_takes_more_than_arguments_is_left_to_triton(metadata: Any, driver: Driver) -> None:
    assert can_prepare([launch(), launch()])
    assert not can_prepare([launch(), launch(**metadata)])


def test_arguments_of_other_types_are_left_to_triton(driver: Driver) -> None:
    of_other = {"x": "*fp32", "flag": "u1"}, (Address(0), True), 4
    assert not can_prepare([launch(*of_other)])
    assert not can_prepare([launch()._replace(grid=(0, 1, 1))])


def test_without_a_driver_all_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_driver", lambda: None)
    assert not can_prepare([launch()])
