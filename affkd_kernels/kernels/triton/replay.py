"""A call done before, done again on other tensors.

The first call of a form leaves behind what it allocated and what it launched. Every parameter of
a kernel is a number or an address, and all but the addresses of inputs and allocations are the same
for every call of the form. So a later call allocates a workspace and its results, works out the
addresses and has the driver launch: little of it is Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ...inputs import Inputs
from .arguments import Address, Launch, PreparedLaunches, can_prepare
from .items import readable

# bytes that the places in a workspace are multiples of
_ALIGNMENT = 256


class _Place(NamedTuple):
    """So many bytes after the beginning of an input, the workspace or a result."""

    base: int
    offset: int


class _Memory:
    """Where the tensors of a call lie: each in an input, the workspace or an output."""

    def __init__(
        self, inputs: Sequence[Tensor], allocated: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        self.bytes = 0  # of the workspace
        self._allocated = allocated
        self._places = {id(x): _Place(base, 0) for base, x in enumerate(inputs)}
        workspace = len(inputs)
        for x in allocated:
            if all(x is not y for y in outputs):
                self._places[id(x)] = _Place(workspace, self.bytes)
                self.bytes += -(-max(x.nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
        for number, x in enumerate(outputs):
            self._places[id(x)] = _Place(workspace + 1 + number, 0)
        self._addresses: dict[_Place, Address] = {}

    @property
    def addresses(self) -> list[_Place]:
        """Of what `addressed` was given, in the order of their numbers."""
        return list(self._addresses)

    def addressed(self, argument: Any) -> Any:
        """An argument of a launch, with addresses in place of tensors."""
        if isinstance(argument, tuple):
            return tuple(map(self.addressed, argument))
        if not isinstance(argument, Tensor):
            return argument
        if not argument.numel():
            return 0  # nobody reads it
        number = len(self._addresses)
        return self._addresses.setdefault(self._place_of(argument), Address(number))

    def _place_of(self, x: Tensor) -> _Place:
        if id(x) in self._places:
            return self._places[id(x)]
        (holder,) = (y for y in self._allocated if _lies_in(x, y))
        base, offset = self._places[id(holder)]
        return _Place(base, offset + x.data_ptr() - holder.data_ptr())


class Replay:
    """The launches of a form of call, and where their arguments come from.

    It holds no tensor, so that a captured graph of a call holds all that it needs.
    """

    def __init__(
        self,
        inputs: Inputs,
        allocated: Sequence[Tensor],
        launches: Sequence[Launch],
        results: Sequence[Tensor | None],
        copied_to: torch.dtype | None = None,
    ) -> None:
        """Of a call that was done.

        Args:
            inputs: as kernels were given them, no two of them one object.
            allocated: what the call allocated, all of it alive.
            launches: what it launched.
            results: what it returned, in tensors it allocated.
            copied_to: the dtype of its computation, where `readable` made copies of inputs.
        """
        self.copied_to = copied_to
        self.device = allocated[0].device
        self.given = [position for position, x in enumerate(inputs) if x is not None]
        returned = [x for x in results if x is not None]
        outputs = [x for x in allocated if any(y is x or _lies_in(y, x) for y in returned)]
        self.outputs = [(tuple(x.shape), x.stride(), x.dtype) for x in outputs]
        self.results = [None if x is None else _view(x, outputs) for x in results]
        memory = _Memory([x for x in inputs if x is not None], allocated, outputs)
        self.bytes = memory.bytes
        self.launches = [
            one._replace(arguments=memory.addressed(one.arguments)) for one in launches
        ]
        self.places = memory.addresses
        self.prepared: PreparedLaunches | None = None
        if can_prepare(self.launches):
            self.prepared = PreparedLaunches(self.launches, len(self.places))

    def __call__(self, inputs: Inputs) -> list[Tensor | None]:
        """The results for these inputs."""
        if self.copied_to is not None:
            inputs = readable(inputs, self.copied_to)
        device = self.device
        workspace = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        # takes less to call than torch.empty
        outputs = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype in self.outputs
        ]
        bases = [inputs[position].data_ptr() for position in self.given]  # type: ignore[union-attr]
        bases.append(workspace.data_ptr())
        bases += [x.data_ptr() for x in outputs]
        self._launch([bases[base] + offset for base, offset in self.places])
        return [
            None if at is None else outputs[at[0]] if at[1] is None else outputs[at[0]][at[1]]
            for at in self.results
        ]

    def _launch(self, addresses: list[int]) -> None:
        done = 0
        if self.prepared is not None and not _has_listeners():
            done = self.prepared(addresses, driver.active.get_current_stream(self.device.index))
        for one in self.launches[done:]:
            one.compiled[one.grid](*_filled(one.arguments, addresses))


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


def _filled(argument: Any, addresses: list[int]) -> Any:
    """An argument as Triton's launcher takes it."""
    if isinstance(argument, Address):
        return addresses[argument.number]
    if isinstance(argument, tuple):
        return tuple(_filled(entry, addresses) for entry in argument)
    return argument


def _has_listeners() -> bool:
    """Whether somebody listens to Triton's launches: a profiler, for instance."""
    runtime = knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)
