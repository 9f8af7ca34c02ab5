"""The folder of one run: what was asked, on what machine, every metric, and checkpoints.

``config.yaml`` and ``env.json`` are written first, ``metrics.jsonl`` grows, ``last.pt`` and
``best.pt`` are replaced whole, ``summary.json`` ends a run. A kill at any instant leaves a folder
that ``RunFolder.open`` can continue. ``.lock`` keeps a second process out.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from affkd_kernels.trainer.config import TrainConfig
from affkd_kernels.trainer.errors import FileContentError, FolderInUseError, reading

try:
    import fcntl
except ImportError:  # no Unix: a second process is not noticed there
    fcntl = None  # type: ignore[assignment]

# what a run may differ in from the one it continues: none of it reaches a weight or a metric
# but `threads`, and those only in the last bits
INCIDENTAL = ("out", "log_every", "threads", "tensorboard")
# what a run has written before its first record; a folder of nothing else may be used again
OPENING = frozenset({"config.yaml", "config.yaml.partial", "env.json", "env.json.partial", ".lock"})


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


def load_checkpoint(path: Path, entries: Collection[str] = ()) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote. Never runs code from the file.

    Raises:
        FileContentError: the file is damaged, or lacks one of the ``entries``.
    """
    with reading(path, "a checkpoint of affkd train, or a damaged one", reason=False):
        state = torch.load(path, map_location="cpu", weights_only=True)
    missing = [name for name in entries if not isinstance(state, dict) or name not in state]
    if missing:
        raise FileContentError(
            path, f"not a checkpoint of affkd train (it has no {', '.join(missing)})"
        )
    return state


def environment() -> dict[str, Any]:
    """What a figure of this run depends on besides its configuration."""
    packages = ("affkd-kernels", "numpy", "triton")
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
    """Paths and records of one run; use ``create`` or ``open``, and ``close`` or ``with``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_checkpoint = path / "last.pt"
        self.best_checkpoint = path / "best.pt"
        self.metrics = path / "metrics.jsonl"
        self._summary = path / "summary.json"
        self._config = path / "config.yaml"
        self._environment = path / "env.json"
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Make a new folder, or take one of a run that never took a step.

        Raises:
            FileExistsError: the folder holds something.
            FolderInUseError: another process trains in it.
        """
        folder = cls(path)
        folder._require_unused()
        with folder._locked_on_success():
            # once more: another process may have been faster
            folder._require_unused()
            folder._start(config)
        return folder

    @classmethod
    def open(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Continue the run in ``path``, or start it where there is none.

        Raises:
            ValueError: the folder belongs to another configuration: half a run of each would be a
                run of neither.
            FileContentError: its configuration cannot be read.
            FolderInUseError: another process trains in it.
        """
        if not (path / "config.yaml").exists():
            return cls.create(path, config)
        folder = cls(path)
        with folder._locked_on_success():
            if folder._unused():
                folder._start(config)
            else:
                folder._require_same(config)
        return folder

    def close(self) -> None:
        """Let other processes use the folder; the end of the process does so too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _locked_on_success(self) -> Iterator[None]:
        """Lock the folder, and keep it locked unless the block fails."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("a")
        try:
            _lock(self._lock)
            yield
        except BlockingIOError as error:
            self.close()
            raise FolderInUseError(
                f"another process trains in the run folder {self.path}; wait for it to end, or "
                "choose another out"
            ) from error
        except BaseException:
            self.close()
            raise

    def _unused(self) -> bool:
        return not self.path.exists() or all(p.name in OPENING for p in self.path.iterdir())

    def _require_unused(self) -> None:
        if not self._unused():
            raise FileExistsError(
                f"the run folder {self.path} is not empty; choose another out, "
                "or continue that run with --resume auto"
            )

    def _require_same(self, config: dict[str, Any]) -> None:
        with reading(self._config, "the configuration of a run"):
            stored = yaml.safe_load(self._config.read_text())
        if not isinstance(stored, dict):
            raise FileContentError(self._config, "not the configuration of a run")
        changed = differences(_essential(stored), _essential(config))
        if changed:
            raise ValueError(
                f"{self.path} holds a run of another configuration: {'; '.join(changed)}"
            )

    def _start(self, config: dict[str, Any]) -> None:
        self._write_json(self._environment, environment())
        # last, because a folder with a configuration counts as a run
        text = yaml.safe_dump(config, sort_keys=False)
        write_atomically(self._config, lambda partial: write_text(partial, text))

    def append_metrics(self, record: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def drop_metrics_after(self, step: int) -> None:
        """Forget what was recorded after the checkpoint that the run continues from."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        text = "".join(line + "\n" for line in kept)
        write_atomically(self.metrics, lambda partial: write_text(partial, text))

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write_json(self._summary, summary)

    def write_evaluation(self, checkpoint: str, scores: dict[str, float]) -> None:
        self._write_json(self.path / f"evaluation-{checkpoint}.json", scores)

    def config(self) -> TrainConfig:
        """The configuration of the run that is here.

        Raises:
            FileNotFoundError: there is none.
            FileContentError: it cannot be read.
        """
        if not self._config.is_file():
            raise FileNotFoundError(f"{self.path} is no run folder: it has no {self._config.name}")
        with reading(self._config, "the configuration of a run"):
            return TrainConfig.from_dict(yaml.safe_load(self._config.read_text()))

    def summary(self) -> dict[str, Any] | None:
        """The summary of the finished run, None before its end."""
        if not self._summary.exists():
            return None
        with reading(self._summary, "the summary of a run; delete it and resume the run"):
            return json.loads(self._summary.read_text())

    def _write_json(self, path: Path, value: dict[str, Any]) -> None:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
        write_atomically(path, lambda partial: write_text(partial, text))


def _lock(file: IO[str]) -> None:
    """Lock the file until it is closed; BlockingIOError where another process has done so."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # a cluster's file system may have no locks: a second process is not noticed there either
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise


def write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        # the line that a kill cut short: it belongs to no step
        return float("inf")


def _essential(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in INCIDENTAL}


def differences(stored: Any, given: Any, name: str = "") -> list[str]:
    """Fields that differ between two nested configurations, as ``name: stored -> given``."""
    if isinstance(stored, dict) and isinstance(given, dict):
        found = []
        for key in {**stored, **given}:
            path = f"{name}.{key}" if name else key
            found += differences(stored.get(key), given.get(key), path)
        return found
    return [] if stored == given else [f"{name} was {stored!r} and is {given!r}"]
