"""The folder of one run: what was asked, on what machine, every metric, and checkpoints.

``config.yaml`` and ``env.json`` are written first, ``metrics.jsonl`` grows, ``last.pt`` and
``best.pt`` are replaced whole, ``summary.json`` ends a run. A kill at any instant leaves a folder
that ``RunFolder.open`` can continue.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place in one step."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    # the rename itself is only durable once the folder's entry is on disk
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain Python values; a reader sees the old file or the new one whole."""
    write_atomically(path, lambda partial: torch.save(state, partial))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote. Never runs code from the file."""
    return torch.load(path, map_location="cpu", weights_only=True)


def environment() -> dict[str, Any]:
    """What a figure of this run depends on besides its configuration."""
    packages = ("affkd-kernels", "torchvision", "numpy", "triton")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        # torch tells its build, as in 2.10.0+cpu, which its package does not
        "packages": {"torch": torch.__version__, **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class RunFolder:
    """Paths and records of one run; use ``create`` or ``open``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_checkpoint = path / "last.pt"
        self.best_checkpoint = path / "best.pt"
        self.metrics = path / "metrics.jsonl"
        self._summary = path / "summary.json"
        self._config = path / "config.yaml"
        self._environment = path / "env.json"

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Make a new folder; FileExistsError where something lies there already."""
        folder = cls(path)
        folder._start(config, leftovers=())
        return folder

    @classmethod
    def open(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Continue the run in ``path``, or start it where there is none.

        ValueError where the folder belongs to another configuration: half a run of each would
        be a run of neither.
        """
        folder = cls(path)
        if not folder._config.exists():
            # all that a kill before the first step of a run can leave behind
            folder._start(config, ("env.json", "env.json.partial", "config.yaml.partial"))
            return folder
        stored = yaml.safe_load(folder._config.read_text())
        changed = _differences(stored, config)
        if changed:
            raise ValueError(f"{path} holds a run of another configuration: {'; '.join(changed)}")
        return folder

    def _start(self, config: dict[str, Any], leftovers: tuple[str, ...]) -> None:
        if self.path.exists() and any(p.name not in leftovers for p in self.path.iterdir()):
            raise FileExistsError(
                f"the run folder {self.path} is not empty; choose another out, "
                "or continue that run with --resume auto"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_json(self._environment, environment())
        # last, because a folder with a configuration counts as a run
        text = yaml.safe_dump(config, sort_keys=False)
        write_atomically(self._config, lambda partial: _write_text(partial, text))

    def append_metrics(self, record: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def drop_metrics_after(self, step: int) -> None:
        """Forget what was recorded after the checkpoint that the run continues from."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= step]
        text = "".join(line + "\n" for line in kept)
        write_atomically(self.metrics, lambda partial: _write_text(partial, text))

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write_json(self._summary, summary)

    def summary(self) -> dict[str, Any] | None:
        """The summary of the finished run, None before its end."""
        return json.loads(self._summary.read_text()) if self._summary.exists() else None

    def _write_json(self, path: Path, value: dict[str, Any]) -> None:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
        write_atomically(path, lambda partial: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        # the line that a kill cut short: it belongs to no step
        return float("inf")


def _differences(stored: Any, given: Any, name: str = "") -> list[str]:
    """Fields that differ between two nested configurations, as ``name: stored -> given``."""
    if isinstance(stored, dict) and isinstance(given, dict):
        found = []
        for key in {**stored, **given}:
            path = f"{name}.{key}" if name else key
            found += _differences(stored.get(key), given.get(key), path)
        return found
    return [] if stored == given else [f"{name} was {stored!r} and is {given!r}"]
