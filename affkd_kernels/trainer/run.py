"""One run from its configuration to its summary: everything around the loop."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from affkd_kernels.trainer.config import SupervisionConfig, TermConfig, TrainConfig
from affkd_kernels.trainer.data import ImageData, load_data
from affkd_kernels.trainer.loop import Observer, Record, Run
from affkd_kernels.trainer.networks import Teacher, load_teacher
from affkd_kernels.trainer.objective import Objective, build_relation
from affkd_kernels.trainer.precision import Precision, set_determinism
from affkd_kernels.trainer.processes import Processes, started_processes
from affkd_kernels.trainer.rehearsal import gradient_shares, rehearse
from affkd_kernels.trainer.run_folder import RunFolder


def run(config: TrainConfig, resume: bool = False, observe: Observer = print) -> Record:
    """Train what ``config`` asks for, teacher included, and return the summary.

    Args:
        config: the run.
        resume: continue the run in ``config.out`` if there is one.
        observe: called with every record that goes into ``metrics.jsonl``, and before the first
            step with the terms' gradient shares; in the main process alone.

    Raises:
        FileExistsError: the run folder holds something and ``resume`` is off.
        FolderInUseError: another process trains in the run folder.
        FileContentError: a checkpoint or a file of the run folder is damaged.
        MissingDataError: the data set is not there.
        ValueError: a name is unknown, nothing is left to minimize, or the folder that is resumed
            belongs to another configuration.
        NonFiniteLossError: a term, or a score of an evaluation, became inf or NaN.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    set_determinism(config.deterministic)
    import_modules(config.imports)
    with started_processes(config.device) as processes:
        # first, so that a mistake is told before anything is written or trained
        objective = build_objective(config, processes.group)
        data = load_data(config.data).to(processes.device(config.device))
        rehearse(config, data, build_objective(config))
        with _opened(config, resume, processes) as folder:
            finished = processes.on_main(folder.summary)
            if finished is not None:
                return finished
            return _train(config, folder, data, objective, observe, processes)


@contextmanager
def _opened(config: TrainConfig, resume: bool, processes: Processes) -> Iterator[RunFolder]:
    """The run folder, which the main process alone locks and writes."""
    folder = RunFolder(Path(config.out))

    def enter() -> None:
        nonlocal folder
        folder = (RunFolder.open if resume else RunFolder.create)(folder.path, config.to_dict())

    processes.on_main(enter)
    with folder:
        yield folder


def _train(
    config: TrainConfig,
    folder: RunFolder,
    data: ImageData,
    objective: Objective,
    observe: Observer,
    processes: Processes,
) -> Record:
    teacher = _prepare_teacher(config, data, observe) if config.needs_teacher() else None
    starts = processes.on_main(lambda: not folder.last_checkpoint.exists())
    if config.relational_terms() and starts and processes.main:
        observe(gradient_shares(config, data, teacher))
    if not config.tensorboard or not processes.main:
        return Run(config, folder, data, objective, teacher, observe, processes).fit()
    from affkd_kernels.trainer.tensorboard import writing

    with writing(folder.path, observe) as observe_and_write:
        return Run(config, folder, data, objective, teacher, observe_and_write, processes).fit()


def import_modules(names: Sequence[str]) -> None:
    """Import a user's modules, from the current folder too; ValueError where one cannot be."""
    if names and os.getcwd() not in sys.path:
        # as `python -m` does; a console script has its own folder there
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"imports: {name!r} cannot be imported: {error}") from error


def build_objective(config: TrainConfig, group: Any = None) -> Objective:
    """The terms of a run; ValueError where there is none.

    Args:
        group: the processes whose images together are a batch; None is this process alone.
    """
    terms = config.relational_terms()
    labels = config.data.labels_per_class != 0 and config.supervision.cross_entropy
    if not (terms or config.supervision.kd or labels):
        raise ValueError(
            "nothing to minimize: give labels and supervision.cross_entropy, supervision.kd, "
            "or a relational term (loss.preset)"
        )
    return Objective(config.supervision, build_relation(terms, group) if terms else None)


def _prepare_teacher(config: TrainConfig, data: ImageData, observe: Observer) -> Teacher:
    """Load the teacher, training it first in a folder of its own where no checkpoint is given."""
    checkpoint = Path(config.teacher.checkpoint or Path(config.out) / "teacher" / "last.pt")
    if config.teacher.checkpoint is None:
        # always resumed: the run that owns this folder has already decided whether to go on
        run(
            teacher_run(config, checkpoint.parent),
            resume=True,
            observe=lambda record: observe({"teacher": True, **record}),
        )
    return load_teacher(
        config.teacher,
        checkpoint,
        config.teacher_features(),
        data,
        config.data.augmented,
        Precision(config.precision),
    )


def teacher_run(config: TrainConfig, out: Path) -> TrainConfig:
    """The run that trains the teacher of ``config``: cross-entropy on every label."""
    lr = config.optimizer.lr if config.teacher.lr is None else config.teacher.lr
    return replace(
        config,
        out=str(out),
        student=config.teacher.model,
        data=replace(config.data, labels_per_class=None),
        optimizer=replace(config.optimizer, epochs=config.teacher.epochs, lr=lr),
        supervision=SupervisionConfig(),
        loss=TermConfig(),
        terms={},
    )
