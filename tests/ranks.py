"""Groups of gloo processes on this machine, each started once, that run all checks of some modules.

A check is a function `check_...(ranks: Ranks)`; every process calls it, and an error in any of them
is its result. Starting processes costs seconds, a check milliseconds.
"""

from __future__ import annotations

import datetime
import importlib
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

# a rank whose partner has failed waits no longer than this
TIMEOUT = datetime.timedelta(seconds=30)


@dataclass
class Ranks:
    """What a check sees: this process, its group, and where it leaves its figures."""

    rank: int
    size: int
    group: Any
    figures: dict[str, float]
    wrong: list[str] = field(default_factory=list)

    def sizes(self, total: int, seed: int) -> list[int]:
        """`total` rows dealt unevenly to the ranks; some may get none."""
        generator = torch.Generator("cpu").manual_seed(seed)
        owners = torch.randint(self.size, (total,), generator=generator, device="cpu")
        return torch.bincount(owners, minlength=self.size).tolist()

    def own(self, sizes: list[int]) -> slice:
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def equal(self, what: str, got: Tensor, want: Tensor, scale: Tensor, within: float) -> None:
        """`got` and `want` differ by at most `within` of the largest entry of `scale`."""
        assert got.shape == want.shape, f"{what}: shape {got.shape}, not {want.shape}"
        largest = scale.abs().max().item() if scale.numel() else 0.0
        error = (got - want).abs().max().item() if want.numel() else 0.0
        relative = error / largest if largest else error
        key = f"{str(want.dtype).removeprefix('torch.')} {what.split(':')[0]}"
        self.figures[key] = max(self.figures.get(key, 0.0), relative)
        # kept for later: a rank that stopped here would leave the others waiting
        if not relative <= within:
            self.wrong.append(f"{what}: relative error {relative:.2e}\n{got}\n{want}")


@cache
def results(modules: tuple[str, ...], size: int) -> dict[str, Any]:
    """Each check's errors by rank, {} if it passed, and under "figures" the largest errors."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_run, (size, modules, folder), nprocs=size, join=True)
        except mp.ProcessException as error:
            # returned, so that the next test need not start the processes to fail again
            return {"crash": str(error)}
        reports = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]
    merged: dict[str, Any] = {"figures": {}}
    for rank, (errors, figures) in enumerate(reports):
        for name, error in errors.items():
            merged.setdefault(name, {}).update({rank: error} if error else {})
        for key, value in figures.items():
            merged["figures"][key] = max(merged["figures"].get(key, 0.0), value)
    return merged


def checks(modules: tuple[str, ...]) -> dict[str, Callable[[Ranks], None]]:
    """The checks of the modules by name."""
    found: dict[str, Callable[[Ranks], None]] = {}
    for module in map(importlib.import_module, modules):
        own = {name: check for name, check in vars(module).items() if name.startswith("check_")}
        twice = own.keys() & found.keys()
        assert not twice, f"two checks are named {twice}"
        found |= own
    return found


def _run(rank: int, size: int, modules: tuple[str, ...], folder: str) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    # a file of this run alone: a fixed port could be taken
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=size, timeout=TIMEOUT)
    figures: dict[str, float] = {}
    errors: dict[str, str] = {}
    for name, check in checks(modules).items():
        torch.manual_seed(0)
        try:
            ranks = Ranks(rank, size, dist.group.WORLD, figures)
            check(ranks)
            errors[name] = "\n".join(ranks.wrong)
        except Exception:
            errors[name] = traceback.format_exc()
            if "Timeout" in errors[name] or "Connection" in errors[name]:
                # the group is out of step, and nothing that follows would mean anything
                break
    torch.save((errors, figures), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
