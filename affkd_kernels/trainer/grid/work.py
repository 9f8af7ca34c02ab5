"""Training the runs of a study: here, in several processes, or through a launcher."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from affkd_kernels.trainer.config import DataConfig, TeacherConfig, TrainConfig
from affkd_kernels.trainer.data import ImageData, load_data
from affkd_kernels.trainer.loop import Run
from affkd_kernels.trainer.networks import Teacher, load_teacher
from affkd_kernels.trainer.precision import Precision
from affkd_kernels.trainer.run import build_objective, import_modules
from affkd_kernels.trainer.run_folder import RunFolder, write_atomically


def train_all(
    configs: Sequence[TrainConfig], jobs: int, launcher: str | None
) -> Iterator[tuple[TrainConfig, str | None]]:
    """Train every run that is not finished; each with what went wrong, or None, as it ends."""
    if launcher is None and jobs == 1:
        yield from ((config, attempt(config)) for config in configs)
        return
    with ExitStack() as stack:
        executor: Executor
        if launcher is None:
            executor = ProcessPoolExecutor(jobs, get_context("spawn"), _end_with, (os.getpid(),))
            submitted = {executor.submit(attempt, config): config for config in configs}
        else:
            executor = ThreadPoolExecutor(jobs)
            submitted = {executor.submit(launch, config, launcher): config for config in configs}
        # Ctrl-C must not wait for all that was submitted
        stack.callback(executor.shutdown, cancel_futures=True)
        for future in as_completed(submitted):
            yield submitted[future], future.result()


def _end_with(parent: int) -> None:
    """End this process when the grid's has ended, a SIGKILL included: it holds a run's lock."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def attempt(config: TrainConfig) -> str | None:
    """Train one run in this process; what went wrong, or None."""
    try:
        _train(config)
    # whatever it is, the other runs go on
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _train(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    import_modules(config.imports)
    objective = build_objective(config)
    with RunFolder.open(Path(config.out), config.to_dict()) as folder:
        if folder.summary() is not None:
            return
        data = shared_data(config)
        teacher = shared_teacher(config) if config.needs_teacher() else None
        Run(config, folder, data, objective, teacher, lambda record: None).fit()


def shared_data(config: TrainConfig) -> ImageData:
    """The data of a run, which runs of other labels and batches in this process share."""
    same = replace(config.data, labels_per_class=None, batch_size=1, labeled_batch=1)
    return _load_data(same, config.device)


@cache
def _load_data(config: DataConfig, device: str) -> ImageData:
    return load_data(config).to(torch.device(device))


def shared_teacher(config: TrainConfig) -> Teacher:
    """The teacher of a run with its cached outputs, which later runs in this process share."""
    paths = tuple(sorted(config.teacher_features()))
    same = replace(config.data, labels_per_class=None, batch_size=1, labeled_batch=1)
    return _load_teacher(config.teacher, paths, same, config.device, Precision(config.precision))


# the outputs of a teacher can be large
@lru_cache(maxsize=4)
def _load_teacher(
    config: TeacherConfig,
    paths: tuple[str, ...],
    data: DataConfig,
    device: str,
    precision: Precision,
) -> Teacher:
    loaded = _load_data(data, device)
    checkpoint = Path(config.checkpoint or "")
    return load_teacher(config, checkpoint, paths, loaded, data.augmented, precision)


def launch(config: TrainConfig, launcher: str) -> str | None:
    """Train one run by a command of its own; what went wrong, or None.

    Beside the run's folder lie its recipe and, as ``.log``, what the command printed.
    """
    out = Path(config.out)
    if (out / "summary.json").exists():
        return None
    recipe = out.with_name(out.name + ".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(recipe, lambda partial: _write(partial, config.to_dict()))
    arguments = ["-m", "affkd_kernels.trainer.cli", "train", "-c", str(recipe), "--resume", "auto"]
    command = shlex.split(launcher.replace("{arguments}", shlex.join(arguments)))
    log = out.with_name(out.name + ".log")
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    return None if code == 0 else f"{command[0]}: {_last_words(log, code)} ({log})"


def _last_words(log: Path, code: int) -> str:
    """The error of ``affkd`` itself, where there is one: launchers have much to say after it."""
    lines = log.read_text(errors="replace").split("\n")
    told = [line for line in lines if line.startswith("error: ")] or list(filter(str.strip, lines))
    return told[-1] if told else f"exit code {code}"


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
