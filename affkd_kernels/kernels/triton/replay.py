"""A call done before, done again on other tensors.

The first call of a form leaves behind what it allocated and what it launched. Every argument of a
kernel is a number or an address, and all but the addresses of inputs and allocations are the same
for every call of the form. So a later call allocates a workspace and its results, works out the
addresses and launches: little of it is Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

# bytes that the places in a workspace are multiples of
_ALIGNMENT = 256


class Launch(NamedTuple):
    """One that was done: a compiled kernel, its grid [3] and all of its arguments."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


class _Place(NamedTuple):
    """An address: so many bytes after the beginning of an input, the workspace or a result."""

    base: int
    offset: int


class _Values:
    """What a call makes its arguments of: addresses, constants, and tuples of all three."""

    def __init__(self, place_of: Callable[[Tensor], _Place]) -> None:
        self.place_of = place_of
        self.places: list[_Place] = []
        self.constants: list[Any] = []
        self.tuples: list[list[tuple[str, int]]] = []
        self._known: dict[int, tuple[str, int]] = {}

    def key_of(self, x: Any) -> tuple[str, int]:
        """In which list it is, and where; what several kernels are given is there once."""
        if id(x) not in self._known or not isinstance(x, (Tensor, tuple)):
            self._known[id(x)] = self._added(x)
        return self._known[id(x)]

    def _added(self, x: Any) -> tuple[str, int]:
        if isinstance(x, Tensor) and x.numel():
            self.places.append(self.place_of(x))
            return "place", len(self.places) - 1
        if isinstance(x, tuple):
            assert len(x) > 1  # of one, an itemgetter makes no tuple
            self.tuples.append([self.key_of(entry) for entry in x])
            return "tuple", len(self.tuples) - 1
        # nobody reads an empty tensor
        self.constants.append(0 if isinstance(x, Tensor) else x)
        return "constant", len(self.constants) - 1

    def getter(self, keys: list[tuple[str, int]]) -> itemgetter[Any]:
        """Takes them from one list: places, then constants, then tuples."""
        starts = {"place": 0, "constant": len(self.places)}
        starts["tuple"] = starts["constant"] + len(self.constants)
        return itemgetter(*(starts[kind] + position for kind, position in keys))


class Replay:
    """The launches of a form of call, and where their arguments come from.

    It holds no tensor, so that a captured graph of a call holds all that it needs.
    """

    def __init__(
        self,
        sources: Sequence[Tensor | None],
        allocated: Sequence[Tensor],
        launches: Sequence[Launch],
        results: Sequence[Tensor | None],
    ) -> None:
        """Of a call that was done.

        Args:
            sources: the inputs as kernels were given them, no two of them one object.
            allocated: what the call allocated, all of it alive.
            launches: what it launched.
            results: what it returned, in tensors it allocated.
        """
        self.device = allocated[0].device
        self.given = [position for position, x in enumerate(sources) if x is not None]
        returned = [x for x in results if x is not None]
        outputs = [x for x in allocated if any(y is x or _lies_in(y, x) for y in returned)]
        self.outputs = [(tuple(x.shape), x.stride(), x.dtype) for x in outputs]
        self.results = [None if x is None else _view(x, outputs) for x in results]
        bases = {id(sources[i]): _Place(base, 0) for base, i in enumerate(self.given)}
        workspace, self.bytes = len(self.given), 0
        for x in allocated:
            if all(x is not y for y in outputs):
                bases[id(x)] = _Place(workspace, self.bytes)
                self.bytes += -(-max(x.nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
        for number, x in enumerate(outputs):
            bases[id(x)] = _Place(workspace + 1 + number, 0)

        def place_of(x: Tensor) -> _Place:
            if id(x) in bases:
                return bases[id(x)]
            (holder,) = (y for y in allocated if _lies_in(x, y))
            base, offset = bases[id(holder)]
            return _Place(base, offset + x.data_ptr() - holder.data_ptr())

        values = _Values(place_of)
        keys = [[values.key_of(x) for x in one.arguments] for one in launches]
        self.places, self.constants = values.places, values.constants
        self.tuples = [values.getter(entries) for entries in values.tuples]
        self.launches = [
            (one.compiled, one.grid, values.getter(entries))
            for one, entries in zip(launches, keys, strict=True)
        ]

    def __call__(self, sources: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The results for these inputs."""
        device = self.device
        workspace = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        # takes less to call than torch.empty
        outputs = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype in self.outputs
        ]
        bases = [sources[position].data_ptr() for position in self.given]  # type: ignore[union-attr]
        bases.append(workspace.data_ptr())
        bases += [x.data_ptr() for x in outputs]
        values: list[Any] = [bases[base] + offset for base, offset in self.places]
        values += self.constants
        for get in self.tuples:
            values.append(get(values))
        launch = _launcher(device)
        for compiled, grid, get in self.launches:
            launch(compiled, grid, get(values))
        return [
            None if at is None else outputs[at[0]] if at[1] is None else outputs[at[0]][at[1]]
            for at in self.results
        ]


def _lies_in(x: Tensor, holder: Tensor) -> bool:
    begin = x.data_ptr() - holder.data_ptr()
    return bool(x.numel()) and 0 <= begin < holder.nbytes


def _view(x: Tensor, outputs: Sequence[Tensor]) -> tuple[int, int | None]:
    """Which output a result is, or which entry of which it is."""
    for number, holder in enumerate(outputs):
        if x is holder:
            return number, None
        if _lies_in(x, holder) and not x.shape:
            return number, (x.data_ptr() - holder.data_ptr()) // x.element_size()
    raise ValueError("a result lies in nothing that the call allocated")


def _launcher(device: torch.device) -> Callable[[Any, tuple[int, ...], tuple[Any, ...]], None]:
    """How to launch now: as Triton's public way does, which looks up more than once a call needs.

    That way itself where somebody listens to launches, and on devices whose driver is none of
    Triton's own.
    """
    from triton import knobs
    from triton.runtime import driver

    runtime = knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    if device.type == "xpu" or any(getattr(hook, "calls", hook) for hook in hooks):
        return _launch_as_public
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())

    def launch(compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
        )

    return launch


def _launch_as_public(compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    compiled[grid](*arguments)
