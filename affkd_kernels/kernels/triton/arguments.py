"""The arguments of launches, laid out in memory once as the CUDA driver reads them.

Triton's launcher takes apart a kernel's arguments, some fifty of them, at every launch. When a call
is done again, all but a dozen addresses are what they were: those are written over the former ones,
and the driver launches.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

# how `struct` writes the numbers that kernels take, by Triton's names of their types
_FORMATS = {"i32": "i", "i64": "q", "fp64": "d"}
# the last two parameters of every kernel of Triton's: memory that its compiler may ask for
_SCRATCH = 2
# what a launch may have besides its arguments, and with which it is Triton's to do
_OTHER_FEATURES = (
    "launch_cooperative_grid",
    "launch_pdl",
    "global_scratch_size",
    "profile_scratch_size",
    "instrumentation_mode",
    "tensordesc_meta",
)


class Launch(NamedTuple):
    """A compiled kernel, its grid [3], and all of its arguments in order.

    Pointers are tensors in a call that was done, and `Address` in one that is to be done again.
    """

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Address:
    """An argument, or an entry of one: which of a call's addresses it is."""

    number: int


class _Config(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class PreparedLaunches:
    """The launches of a call, complete but for its addresses and the stream."""

    def __init__(self, launches: Sequence[Launch], address_count: int) -> None:
        """Of launches that `can_prepare`, and of all addresses that are among their arguments."""
        parameters = [list(_parameters(one)) for one in launches]
        numbers = {x for x in itertools.chain(*parameters) if isinstance(x, bytes)}
        # 8 bytes for whatever it is: the addresses, a null, the numbers
        null = address_count
        slot_of = {number: null + 1 + position for position, number in enumerate(numbers)}
        self._slots = (ctypes.c_uint64 * (null + 1 + len(numbers)))()
        for number, slot in slot_of.items():
            (self._slots[slot],) = struct.unpack("Q", number)
        first = ctypes.addressof(self._slots)
        self._driver = _driver()
        self._launches = []
        for one, values in zip(launches, parameters, strict=True):
            slots = [slot_of[x] if isinstance(x, bytes) else x.number for x in values]
            slots += [null] * _SCRATCH
            pointers = (ctypes.c_void_p * len(slots))(*(first + 8 * slot for slot in slots))
            metadata = one.compiled.metadata
            threads = metadata.target.warp_size * metadata.num_warps
            config = _Config(one.grid, (threads, 1, 1), metadata.shared)
            function = ctypes.c_void_p(one.compiled.function)
            self._launches.append((config, ctypes.byref(config), function, pointers))
        self._lock = threading.Lock()

    def __call__(self, addresses: list[int], stream: int) -> int:
        """How many launches the driver took: fewer than all if it refused one.

        It refuses a thread that has no context, for instance; Triton knows what to do then, or what
        to say.
        """
        launch = self._driver
        # threads share the slots; the driver has copied what is in them when it returns
        with self._lock:
            self._slots[: len(addresses)] = addresses  # type: ignore[assignment]
            for done, (config, at_config, function, pointers) in enumerate(self._launches):
                config.stream = stream
                if launch(at_config, function, pointers, None):
                    return done
        return len(self._launches)


def can_prepare(launches: Sequence[Launch]) -> bool:
    """Whether `PreparedLaunches` knows of all that these launches take."""
    return all(map(_is_plain, launches)) and _driver() is not None


def _is_plain(one: Launch) -> bool:
    metadata = one.compiled.metadata
    if metadata.target.backend != "cuda" or metadata.num_ctas != 1 or 0 in one.grid:
        return False
    if any(getattr(metadata, name, None) for name in _OTHER_FEATURES):
        return False
    kinds = [kind for kind, _ in _leaves(_signature(one), one.arguments)]
    if _count_parameters(one.compiled.asm["ptx"]) != len(kinds) + _SCRATCH:
        return False
    return all(kind in _FORMATS or kind.startswith("*") for kind in kinds)


def _count_parameters(ptx: str) -> int:
    """Of the kernel, the only one in its module."""
    entry = re.search(r"\.entry[^(]*\(([^)]*)\)", ptx)
    return entry[1].count(".param") if entry else 0


def _signature(one: Launch) -> tuple[Any, ...]:
    return tuple(one.compiled.src.signature.values())


def _leaves(kind: Any, argument: Any) -> Iterator[tuple[str, Any]]:
    """The type and the value of every parameter, of those that were not compiled into a kernel.

    The type of an argument that is a tuple is one, as in ("*fp32", ("i64", "constexpr")).
    """
    if isinstance(kind, tuple):
        for entry_kind, entry in zip(kind, argument, strict=True):
            yield from _leaves(entry_kind, entry)
    elif kind != "constexpr":
        yield kind, argument


def _parameters(one: Launch) -> Iterator[bytes | Address]:
    for kind, value in _leaves(_signature(one), one.arguments):
        if isinstance(value, Address):
            yield value
        else:
            yield struct.pack(_FORMATS.get(kind, "Q"), value).ljust(8, b"\0")


@functools.cache
def _driver() -> Any:
    """The driver's cuLaunchKernelEx, in the library that the process has loaded already."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
