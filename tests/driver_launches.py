"""What the driver is given by a call that is done again, and by Triton.

Kernels are compiled for a GPU and launched over a stand-in for its driver, where the interpreter of
the other tests would be in the way: test_triton_launches.py runs this as a command of its own. It
prints how many launches it compared.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from affkd_kernels.inputs import Inputs, canonical_inputs
from affkd_kernels.kernels import triton as kernels
from affkd_kernels.kernels.result import Needs
from affkd_kernels.kernels.triton import arguments, plan, replay
from affkd_kernels.spec import LossSpec, make_spec
from benchmarks.launcher import stand_in_driver

STREAM = 0x123456789ABC
# bytes of a parameter that a kernel reads, where they are not 8
SIZES = {"i32": 4}


class Kept(ctypes.Structure):
    """A launch that the stand-in wrote down."""

    _fields_ = (
        ("config", arguments._Config),
        ("function", ctypes.c_void_p),
        ("parameters", ctypes.c_int64 * 128),
    )

    def read(self, kinds: list[str]) -> tuple[Any, ...]:
        """All that makes a difference, of parameters of these types."""
        config = self.config
        parameters = (x.to_bytes(8, "little", signed=True) for x in self.parameters)
        return (
            *(tuple(config.grid), tuple(config.block), config.shared_bytes, config.stream),
            *(config.attribute_count, self.function),
            *(x[: SIZES.get(kind, 8)] for x, kind in zip(parameters, kinds, strict=False)),
        )


def calls() -> Iterator[tuple[LossSpec, Inputs, Needs, str]]:
    """With parameters of every type; with copies, a bank, masks and a learnable scale."""
    spec = make_spec("cosine", "none", "mse")
    yield spec, canonical_inputs(spec, *torch.randn(2, 256, 512))[0], Needs(), "dense"
    spec = make_spec("gram", "softmax", "kl", diagonal_offset=2)
    inputs, _ = canonical_inputs(
        spec,
        torch.randn(40, 50).double().mT,
        torch.randn(50, 24),
        student_keys=torch.randn(72, 40).double(),
        teacher_keys=torch.randn(72, 24).double(),
        mask=torch.rand(50) > 0.2,
        pair_mask=torch.rand(50, 72) > 0.2,
        row_weight=torch.rand(50).half(),
        student_scale=torch.tensor(3.0),
    )
    yield spec, inputs, Needs(True, True, True), "tiled"


def types_of(launch: arguments.Launch) -> list[str]:
    """Of the parameters of a kernel, with those of Triton at the end."""
    leaves = arguments._leaves(arguments._signature(launch), launch.arguments)
    return [*(kind for kind, _ in leaves), "*", "*"]


def assert_the_same_launches(again: replay.Replay, driver: ctypes.CDLL) -> None:
    """Ours with some addresses, ours with others, and Triton's with those others."""
    assert again.prepared is not None
    types = list(map(types_of, again.launches))
    counts = (ctypes.c_int64 * len(types))(*map(len, types))
    assert max(counts) <= len(Kept().parameters)
    found = []
    for prepared, step in ((again.prepared, 1 << 8), (again.prepared, 3 << 8), (None, 3 << 8)):
        kept = (Kept * len(types))()
        driver.stand_in_keep(kept, counts, len(types))
        with mock.patch.object(again, "prepared", prepared):
            again._launch([0x7F0000000000 + step * i for i in range(1, len(again.places) + 1)])
        found.append([one.read(kinds) for one, kinds in zip(kept, types, strict=True)])
    before, ours, theirs = found
    assert ours == theirs
    # every launch has something to write over
    assert all(x != y for x, y in zip(before, ours, strict=True))


def assert_refusals_go_to_triton(call: Callable[[], Any], count: int, driver: ctypes.CDLL) -> None:
    """Which launches after all, or says why it cannot."""
    before = driver.stand_in_launches()
    driver.stand_in_refuse(1)
    call()
    assert driver.stand_in_launches() == before + count
    driver.stand_in_refuse(2)
    try:
        call()
    except RuntimeError as error:
        assert "stand-in" in str(error)
    else:
        raise AssertionError("nothing was raised")


def assert_listeners_hear(call: Callable[[], Any], count: int) -> None:
    heard: list[Any] = []
    hooks = replay.knobs.runtime.launch_enter_hook
    hooks.add(heard.append)
    call()
    hooks.remove(heard.append)
    call()
    assert len(heard) == count


def main() -> None:
    total = 0
    with stand_in_driver() as driver:
        replay.driver.active.get_current_stream = lambda device: STREAM
        for how in calls():
            call = functools.partial(kernels.loss_and_grad, *how)
            call()
            again = plan.make_plan(plan.Form.of(*how, 1.0)).replay
            assert again is not None
            count = len(again.launches)
            assert_the_same_launches(again, driver)
            assert_refusals_go_to_triton(call, count, driver)
            assert_listeners_hear(call, count)
            total += count
    print(total)


if __name__ == "__main__":
    main()
