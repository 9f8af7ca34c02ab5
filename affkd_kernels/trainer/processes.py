"""Several processes that train one student together, started by torchrun; usually there is one."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Which of ``count`` processes this is. The default is a process that trains alone."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """What the losses take as ``process_group``; None in a process that trains alone."""
        return dist.group.WORLD if self.count > 1 else None

    def device(self, asked: str) -> torch.device:
        """This process's own GPU where ``cuda`` is asked for, else what was asked for."""
        if self.count > 1 and asked == "cuda":
            return torch.device("cuda", self.local_rank)
        return torch.device(asked)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes."""
        return model if self.count == 1 else nn.parallel.DistributedDataParallel(model)

    def on_main(self, function: Callable[[], T]) -> T:
        """What ``function`` returns in the main process, in every process.

        Raises:
            RuntimeError: in the other processes, where it raised in the main one.
        """
        if self.count == 1:
            return function()
        if not self.main:
            return self._received()
        try:
            result = function()
        except BaseException as error:
            # without it the others would wait for a result that never comes
            self._send({"error": f"{type(error).__name__}: {error}"})
            raise
        self._send({"result": result})
        return result

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Each value averaged over the processes, which must all have the same names."""
        if self.count == 1:
            return values
        everyone: list[dict[str, float]] = [{} for _ in range(self.count)]
        dist.all_gather_object(everyone, values)
        names = dict.fromkeys(name for one in everyone for name in one)
        # a process without labeled images in this step has no such term: it adds nothing to it
        return {name: sum(one.get(name, 0.0) for one in everyone) / self.count for name in names}

    def _send(self, message: dict[str, Any]) -> None:
        dist.broadcast_object_list([message], src=0)

    def _received(self) -> Any:
        messages: list[Any] = [None]
        dist.broadcast_object_list(messages, src=0)
        if "error" in messages[0]:
            raise RuntimeError(f"the main process failed: {messages[0]['error']}")
        return messages[0]["result"]


ALONE = Processes()


def is_main() -> bool:
    """True in the process that prints, before the processes know each other too."""
    return os.environ.get("RANK", "0") == "0"


def start_group(backend: str) -> None:
    """Connect the processes that torchrun's environment variables tell of.

    Whatever still holds the group at the end of the interpreter keeps its threads alive, and one
    that then lets go of a tensor ends the process by SIGABRT: all is done, and torchrun calls the
    run failed. So the group must be let go of in time, here and in ``end_group``.
    """
    # imported later, as DDP does, its functions would have the group as their default argument
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(backend)


def end_group() -> None:
    """Disconnect the processes, and end the threads that work for them in this one."""
    # what is trained under DDP holds the group, and may lie in a cycle of references
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def started_processes(device: str) -> Iterator[Processes]:
    """The processes that torchrun's environment variables tell of, connected with each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    # a run that trains its teacher first is a run within a run
    owner = not dist.is_initialized()
    if owner:
        start_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        if owner:
            end_group()
