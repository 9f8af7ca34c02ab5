"""One case, measured: here, or with another allocator in a process of its own."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .accuracy import Error, error_of, true_values
from .child import TUNED_ALLOCATOR, ChildFailed, hand_back, run_module
from .floor import floors
from .inputs import CaseInputs, make_inputs
from .measure import Timing, interleaved
from .memory import MemoryUnknown, case_named, extra_peak
from .providers import (
    AUTO,
    AUTO_AGAIN,
    OURS,
    Provider,
    Unavailable,
    make_provider,
    plan_of,
    provider_names,
)
from .registry import CHUNKED, COMPILE, EAGER, Case

logger = logging.getLogger(__name__)

# a process each takes seconds: what a user would choose between, and what has a bound
MEMORY_OF = (EAGER, COMPILE, CHUNKED, AUTO, "cpp-tiled", "triton-tiled")
# the ratio of two equal providers' medians, outside of which nothing is concluded
QUIET = (0.95, 1.05)


@dataclass
class Measured:
    """What is known of one provider; see benchmarks/results/README.md for the JSON form."""

    seconds: Timing | None = None
    error: Error | None = None
    passes: bool | None = None
    extra_bytes: int | None = None
    memory_note: str | None = None
    skipped: str | None = None
    # of a GPU alone
    wall: Timing | None = None
    launches: int | None = None


@dataclass
class CaseRecord:
    """One case: what was called, and what every provider made of it."""

    name: str
    method: str
    regime: str
    shape: tuple[int, ...]
    extent: tuple[int, int, int, int]
    dtype: str
    precision: str
    allocator: str
    plan: str | None
    providers: dict[str, Measured] = field(default_factory=dict)

    @property
    def control_ratio(self) -> float | None:
        """The A/A ratio: auto against itself."""
        pair = [self.providers.get(name) for name in (AUTO, AUTO_AGAIN)]
        times = [measured.seconds for measured in pair if measured and measured.seconds]
        return times[0].median / times[1].median if len(times) == 2 else None

    @property
    def noisy(self) -> bool:
        ratio = self.control_ratio
        return ratio is None or not QUIET[0] <= ratio <= QUIET[1]

    def as_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "control_ratio": self.control_ratio,
            "noisy": self.noisy,
        }


def measure_case(case: Case, *, memory: bool = True, baselines: bool = True) -> CaseRecord:
    """Errors, times and memory of every provider that is usable on this machine's CPU.

    Without ``baselines`` ours alone are timed, against the floor; an error is judged by a
    baseline's, so there is none.
    """
    if not baselines:
        case = dataclasses.replace(case, against=())
    inputs = make_inputs(case)
    record = new_record(case, inputs)
    logger.info("%s: errors against float64", case.name)
    truth = true_values(case, inputs) if baselines else None
    usable = usable_providers(case, inputs, record, truth)
    judge(record)
    logger.info("%s: times", case.name)
    for name, timing in _timings(case, inputs, usable).items():
        record.providers.setdefault(name, Measured()).seconds = timing
    if case.memory and memory:
        logger.info("%s: memory", case.name)
        for name in MEMORY_OF:
            if name in usable:
                _add_memory(case, name, record.providers[name])
    return record


def measure_tuned(case: Case, record: CaseRecord, *, timeout: float) -> CaseRecord | str:
    """The times again under `TUNED_ALLOCATOR`, with the errors of ``record``; or why not."""
    arguments = (case.name, "--threads", str(torch.get_num_threads()))
    try:
        times = run_module(__name__, *arguments, environment=TUNED_ALLOCATOR, timeout=timeout)
    except ChildFailed as error:
        return str(error)
    tuned = dataclasses.replace(record, allocator="tuned", providers={})
    for name, values in times.items():
        known = record.providers.get(name, Measured())
        tuned.providers[name] = Measured(Timing(**values), known.error, known.passes)
    return tuned


def new_record(case: Case, inputs: CaseInputs) -> CaseRecord:
    plan = plan_of(case, inputs)
    return CaseRecord(
        *(case.name, case.method, case.regime, case.shape, case.extent),
        *(case.dtype, case.precision),
        allocator="default",
        plan=None if plan is None else str(plan),
    )


def usable_providers(
    case: Case,
    inputs: CaseInputs,
    record: CaseRecord,
    truth: tuple[Tensor, ...] | None = None,
    refuse: Callable[[str], None] = lambda name: None,
) -> dict[str, Provider]:
    """The usable providers; their errors, and the others' reasons, go to the record.

    ``refuse`` raises for those that are not to be tried.
    """
    usable: dict[str, Provider] = {}
    for name in provider_names(case):
        measured = record.providers[name] = Measured()
        try:
            refuse(name)
            provider = _distinct(name, case, record)
            values = provider.step(inputs)
        except Exception as error:  # whatever a baseline or a missing backend raises
            measured.skipped = one_line(error)
            continue
        usable[name] = provider
        if truth is not None:
            measured.error = error_of(values, truth)
    return usable


def _distinct(name: str, case: Case, record: CaseRecord) -> Provider:
    """The provider, unless ``auto`` is the very same."""
    asked = OURS.get(name)
    if asked and record.plan:
        same = "/".join((asked["backend"], asked.get("algorithm", "dense")))
        if record.plan.partition(":")[0] == same:
            raise Unavailable("what auto runs")
    return make_provider(name, case)


def one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    known = isinstance(error, (Unavailable, RuntimeError)) and first
    return first if known else f"{type(error).__name__}: {first}"


def judge(record: CaseRecord) -> None:
    """Hold every error to the first baseline's own."""
    baseline = next(
        (m.error for name, m in record.providers.items() if name not in OURS and m.error), None
    )
    for measured in record.providers.values():
        if measured.error is not None and baseline is not None:
            measured.passes = measured.error.within(baseline)


def _timings(case: Case, inputs: CaseInputs, usable: dict[str, Provider]) -> dict[str, Timing]:
    steps: dict[str, Any] = {
        name: lambda provider=provider: provider.step(inputs) for name, provider in usable.items()
    }
    bounds = floors(case)
    steps |= {name: floor.step for name, floor in bounds.items()}
    timings = interleaved(steps, case.seconds)
    return {
        name: timing.scaled(bounds[name].times) if name in bounds else timing
        for name, timing in timings.items()
    }


def _add_memory(case: Case, name: str, measured: Measured) -> None:
    try:
        measured.extra_bytes = extra_peak(case, name)
    except MemoryUnknown as error:
        measured.memory_note = str(error)


def main() -> None:
    """The times alone, for a parent that set the environment."""
    parser = argparse.ArgumentParser(description="The times of one case, as JSON.")
    parser.add_argument("case")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    case = case_named(arguments.case)
    inputs = make_inputs(case)
    usable = usable_providers(case, inputs, new_record(case, inputs))
    times = _timings(case, inputs, usable)
    hand_back({name: dataclasses.asdict(timing) for name, timing in times.items()})


if __name__ == "__main__":
    main()
