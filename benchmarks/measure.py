"""Timing: interleaved rounds in random order, a warm call before each timed one."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]

# beyond this, a warm call changes nothing that a clock could see
WARM_CALL_BELOW = 1.0
# a step slower than this is timed once and left out of the further rounds
TIMED_ONCE_ABOVE = 30.0
# larger than the second-level cache of any GPU
FLUSHED_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Quantiles of the calls' wall times, in seconds."""

    p20: float
    median: float
    p80: float
    calls: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)
        p20, median, p80 = (_quantile(ordered, q) for q in (0.2, 0.5, 0.8))
        return cls(p20, median, p80, len(ordered))

    def scaled(self, factor: float) -> Timing:
        return Timing(self.p20 * factor, self.median * factor, self.p80 * factor, self.calls)


def _quantile(ordered: list[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class CpuTimer:
    def __call__(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


class DeviceTimer:
    """Events around one call on an idle GPU with a cold second-level cache.

    The device is idle when the call begins, so what the host needs between two launches counts
    wherever it is longer than the kernels: it is what a single small loss costs.
    """

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, step: Step) -> float:
        self.flushed.zero_()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


class WallTimer:
    """The wall time from an idle GPU to an idle GPU, the caches as the calls before left them."""

    def __call__(self, step: Step) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def interleaved(
    steps: dict[str, Step],
    seconds: float,
    *,
    timer: Callable[[Step], float] | None = None,
    min_rounds: int = 3,
    max_rounds: int = 200,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time every step once a round, in a new random order each, until ``seconds`` have passed.

    Position alone moves small calls by a fifth: what ran before decides what the caches hold.
    Hence the random order, and before each short timed call one of the same step that does not
    count.
    """
    timer = timer or CpuTimer()
    order = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    started = time.perf_counter()
    rounds = 0
    with _no_collection():
        while rounds < min_rounds or (
            rounds < max_rounds and time.perf_counter() - started < seconds
        ):
            order.shuffle(names)
            for name in list(names):
                if samples[name] and samples[name][-1] > TIMED_ONCE_ABOVE:
                    names.remove(name)
                    continue
                if not samples[name]:
                    first = timer(steps[name])
                    if first >= WARM_CALL_BELOW:
                        samples[name].append(first)
                        continue
                elif samples[name][-1] < WARM_CALL_BELOW:
                    steps[name]()
                samples[name].append(timer(steps[name]))
            rounds += 1
    return {name: Timing.of(values) for name, values in samples.items()}


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
