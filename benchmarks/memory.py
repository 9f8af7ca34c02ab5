"""Peak memory of one forward and backward, beyond what was there before it.

On the CPU it is measured in a process of its own, ``python -m benchmarks.memory CASE PROVIDER``, as
the rise of the resident set's high-water mark during the first call on the case's shapes: what an
allocator keeps for later calls counts. A call on few items comes before, so that loading libraries
does not. What ``torch.compile`` needs to compile is no property of the loss, so there it is the
second call that is measured, after the first one's memory has gone back to the system.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
from pathlib import Path

import torch

from .child import ChildFailed, hand_back, run_module
from .inputs import CaseInputs, make_inputs
from .providers import Provider, make_provider
from .registry import CASES, COMPILE, Case

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryUnknown(Exception):
    """The peak cannot be measured here, or the call failed; the text says why."""


def extra_peak(case: Case, name: str, *, timeout: float = 180.0) -> int:
    """Bytes beyond the inputs, the gradients of the call included.

    Raises:
        MemoryUnknown: the process failed or took too long, or the system has no such counter.
    """
    if not _CLEAR_REFS.exists():
        raise MemoryUnknown("needs /proc/self/clear_refs, which Linux has")
    try:
        arguments = (case.name, name, "--threads", str(torch.get_num_threads()))
        return int(run_module(__name__, *arguments, timeout=timeout))
    except ChildFailed as error:
        raise MemoryUnknown(str(error)) from None


def extra_peak_on_gpu(provider: Provider, inputs: CaseInputs) -> int:
    """The same on a GPU, by the allocator's own count; the provider must have run before."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    provider.step(inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def first_call_peak(case: Case, provider: Provider) -> int:
    """The rise of the resident set in the first call of this process, in bytes."""
    inputs = make_inputs(case)
    if provider.name == COMPILE:
        provider.step(inputs)
    else:
        provider.step(make_inputs(case.shrunk()))
    gc.collect()
    _return_memory_to_system()
    _CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    provider.step(inputs)
    return _status("VmHWM") - before


def _return_memory_to_system() -> None:
    # only glibc keeps freed memory that it must be asked for
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found, f"{_STATUS} has no {key}"
    return int(found[1]) * 1024


def case_named(name: str) -> Case:
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(f"no case is called {name!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The peak memory of one call, in bytes.")
    parser.add_argument("case")
    parser.add_argument("provider")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    case = case_named(arguments.case)
    hand_back(first_call_peak(case, make_provider(arguments.provider, case)))


if __name__ == "__main__":
    main()
