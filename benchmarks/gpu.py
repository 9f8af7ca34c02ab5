"""One case on a GPU: errors, launches, memory, and times of the device and of the clock.

Whatever a provider raises, running out of memory included, is recorded as its reason, and the
others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .accuracy import true_values
from .floor import floors
from .inputs import CaseInputs, make_inputs
from .measure import DeviceTimer, Timing, interleaved
from .memory import extra_peak_on_gpu
from .providers import AUTO, Provider, Unavailable
from .rates import bursts, count_launches, launch_floors
from .registry import COMPILE, LIGER, MAX_AUTOTUNE, Case
from .single import CaseRecord, Measured, judge, new_record, one_line, usable_providers

# seconds that must be left for a provider that compiles
COMPILES_IN = {COMPILE: 40.0, MAX_AUTOTUNE: 120.0, LIGER: 40.0}
# what a fused loss takes at training sizes, where launches cannot be counted
DEFAULT_LAUNCHES = 3


def measure_on_gpu(case: Case, left: Callable[[], float]) -> CaseRecord:
    """The record of a case; ``left()`` are the seconds that the suite still has."""
    torch.set_float32_matmul_precision(case.precision)
    inputs = make_inputs(case, "cuda")
    record = new_record(case, inputs)

    def refuse(name: str) -> None:
        # what the last one left, above all if it ran out of memory
        torch.cuda.empty_cache()
        if left() < COMPILES_IN.get(name, 0.0):
            raise Unavailable("out of time to compile it")

    usable = usable_providers(case, inputs, record, _truth(case, inputs), refuse)
    torch.cuda.empty_cache()
    judge(record)
    for name, provider in usable.items():
        _count(provider, inputs, record.providers[name])
    _time(case, inputs, usable, record)
    torch.cuda.empty_cache()
    return record


def _truth(case: Case, inputs: CaseInputs) -> tuple[Tensor, ...] | None:
    try:
        return true_values(case, inputs)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _count(provider: Provider, inputs: CaseInputs, measured: Measured) -> None:
    try:
        measured.launches = count_launches(lambda: provider.step(inputs))
        measured.extra_bytes = extra_peak_on_gpu(provider, inputs)
    except RuntimeError as error:
        measured.memory_note = one_line(error)


def _time(case: Case, inputs: CaseInputs, usable: dict[str, Provider], record: CaseRecord) -> None:
    steps: dict[str, Callable[[], Any]] = {
        name: lambda provider=provider: provider.step(inputs) for name, provider in usable.items()
    }
    bounds = floors(case, "cuda")
    steps |= {name: floor.step for name, floor in bounds.items()}
    own = record.providers.get(AUTO)
    steps |= launch_floors((own and own.launches) or DEFAULT_LAUNCHES)
    torch.set_float32_matmul_precision(case.precision)
    single = interleaved(steps, case.seconds, timer=DeviceTimer())
    called = {name: step for name, step in steps.items() if name not in bounds}
    wall = bursts(called, single, case.seconds / 2)
    for name, timing in single.items():
        measured = record.providers.setdefault(name, Measured())
        measured.seconds = _scaled(timing, bounds[name].times if name in bounds else 1.0)
        measured.wall = wall.get(name)


def _scaled(timing: Timing, times: float) -> Timing:
    return timing if times == 1.0 else timing.scaled(times)
