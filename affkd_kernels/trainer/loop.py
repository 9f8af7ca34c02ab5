"""The training loop: one run from its configuration to its summary, interruptible anywhere."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from affkd_kernels.trainer.config import SupervisionConfig, TermConfig, TrainConfig
from affkd_kernels.trainer.data import Batch, ImageData, load_data
from affkd_kernels.trainer.errors import reading
from affkd_kernels.trainer.evaluate import evaluate
from affkd_kernels.trainer.networks import ObservedNetwork, Teacher, load_teacher
from affkd_kernels.trainer.objective import (
    NonFiniteLossError,
    Objective,
    build_relation,
    require_finite,
    require_finite_scores,
)
from affkd_kernels.trainer.optimizer import build_optimizer, learning_rate, set_learning_rate
from affkd_kernels.trainer.rehearsal import gradient_shares, rehearse
from affkd_kernels.trainer.run_folder import RunFolder, load_checkpoint, save_checkpoint
from affkd_kernels.trainer.step import TeacherAnswers, batch_order, initial_student, step_losses

Record = dict[str, Any]
Observer = Callable[[Record], None]
CHECKPOINT_ENTRIES = (
    *("weights", "optimizer", "order", "random"),
    *("step", "last", "best", "seconds"),
)


def run(config: TrainConfig, resume: bool = False, observe: Observer = print) -> Record:
    """Train what ``config`` asks for, teacher included, and return the summary.

    Args:
        config: the run.
        resume: continue the run in ``config.out`` if there is one.
        observe: called with every record that goes into ``metrics.jsonl``, and before the first
            step with the terms' gradient shares.

    Raises:
        FileExistsError: the run folder holds something and ``resume`` is off.
        FolderInUseError: another process trains in the run folder.
        FileContentError: a checkpoint or a file of the run folder is damaged.
        ValueError: a name is unknown, nothing is left to minimize, or the folder that is resumed
            belongs to another configuration.
        NonFiniteLossError: a term, or a score of an evaluation, became inf or NaN.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    import_modules(config.imports)
    # first, so that a mistake is told before anything is written or trained
    objective = build_objective(config)
    data = load_data(config.data).to(torch.device(config.device))
    rehearse(config, data, objective)
    open_folder = RunFolder.open if resume else RunFolder.create
    with open_folder(Path(config.out), config.to_dict()) as folder:
        finished = folder.summary()
        if finished is not None:
            return finished
        teacher = _prepare_teacher(config, data, observe) if config.needs_teacher() else None
        if config.relational_terms() and not folder.last_checkpoint.exists():
            observe(gradient_shares(config, data, teacher))
        return Run(config, folder, data, objective, teacher, observe).fit()


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


def build_objective(config: TrainConfig) -> Objective:
    """The terms of a run; ValueError where there is none."""
    terms = config.relational_terms()
    labels = config.data.labels_per_class != 0 and config.supervision.cross_entropy
    if not (terms or config.supervision.kd or labels):
        raise ValueError(
            "nothing to minimize: give labels and supervision.cross_entropy, supervision.kd, "
            "or a relational term (loss.preset)"
        )
    return Objective(config.supervision, build_relation(terms) if terms else None)


def _prepare_teacher(config: TrainConfig, data: ImageData, observe: Observer) -> Teacher:
    """Load the teacher, training it first in a folder of its own where no checkpoint is given."""
    paths = {term.teacher_feature for term in config.relational_terms().values()}
    if config.teacher.checkpoint is not None:
        return load_teacher(config.teacher, Path(config.teacher.checkpoint), paths, data)
    out = Path(config.out) / "teacher"
    # always resumed: the run that owns this folder has already decided whether to go on
    run(teacher_run(config, out), resume=True, observe=lambda r: observe({"teacher": True, **r}))
    return load_teacher(config.teacher, out / "last.pt", paths, data)


def teacher_run(config: TrainConfig, out: Path) -> TrainConfig:
    """The run that trains the teacher of ``config``: cross-entropy on every label."""
    return replace(
        config,
        out=str(out),
        student=config.teacher.model,
        data=replace(config.data, labels_per_class=None),
        optimizer=replace(config.optimizer, epochs=config.teacher.epochs),
        supervision=SupervisionConfig(),
        loss=TermConfig(),
        terms={},
    )


class Run:
    """The state of one run: what a checkpoint holds, and what it is computed from."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        data: ImageData,
        objective: Objective,
        teacher: TeacherAnswers | None = None,
        observe: Observer = print,
    ) -> None:
        self.config = config
        self.folder = folder
        self.data = data
        self.objective = objective
        self.teacher = teacher
        self.observe = observe
        torch.manual_seed(config.seed)
        self.model = initial_student(config, data)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.order = batch_order(config, data)
        self.total_steps = self.order.steps_per_epoch * config.optimizer.epochs
        self.step = 0
        self.last: Record = {}
        self.best: Record = {}
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // self.order.steps_per_epoch

    @property
    def seconds(self) -> float:
        """Time spent, that of interrupted attempts up to their last checkpoint included."""
        return self._seconds_before + time.perf_counter() - self._started

    def fit(self) -> Record:
        """Train from the last checkpoint, or from the start, to the end; the summary."""
        self._restore()
        paths = {term.student_feature for term in self.config.relational_terms().values()}
        network = ObservedNetwork(self.model, paths)
        try:
            while self.step < self.total_steps:
                self._train_to_end_of_epoch(network)
                self._finish_epoch()
        finally:
            network.remove()
        return self._summarize()

    def _train_to_end_of_epoch(self, network: ObservedNetwork) -> None:
        self.model.train()
        every = self.config.checkpoint_every
        for batch in self.order.epoch():
            self._take_step(network, batch)
            # a checkpoint at an epoch's last step would go on without that epoch's evaluation
            inside = self.step % self.order.steps_per_epoch != 0
            if every and self.step % every == 0 and inside:
                self._save(self.folder.last_checkpoint)

    def _take_step(self, network: ObservedNetwork, batch: Batch) -> None:
        rate = learning_rate(self.config.optimizer, self.step, self.total_steps)
        set_learning_rate(self.optimizer, rate)
        total, terms = step_losses(self.objective, network, self.teacher, self.data, batch)
        self.step += 1
        with self._failure_recorded():
            require_finite(total, terms, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        if self.step % self.config.log_every == 0:
            values = {name: value.item() for name, value in terms.items()}
            self._record("train", rate=rate, total=total.item(), terms=values)

    @contextmanager
    def _failure_recorded(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteLossError as error:
            # JSON has no NaN: the values go in as text
            text = {name: str(value) for name, value in error.terms.items()}
            self._record("non_finite", terms=text)
            raise

    def _finish_epoch(self) -> None:
        if self.epoch % self.config.eval_every and self.step < self.total_steps:
            return
        scores = evaluate(self.model, self.data)
        with self._failure_recorded():
            require_finite_scores(scores, self.step)
        self.last = {"epoch": self.epoch, "step": self.step, **scores}
        self._record("evaluation", **scores)
        if not self.best or scores["test_accuracy"] > self.best["test_accuracy"]:
            self.best = self.last
            self._save(self.folder.best_checkpoint)
        self._save(self.folder.last_checkpoint)

    def _record(self, kind: str, **values: Any) -> None:
        place = {"kind": kind, "epoch": self.epoch, "step": self.step}
        record = {**place, **values, "seconds": self.seconds}
        self.folder.append_metrics(record)
        self.observe(record)

    def _save(self, path: Path) -> None:
        state = {
            "model": self.config.student,
            "data": self.data.identity,
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "last": self.last,
            "best": self.best,
            "seconds": self.seconds,
        }
        save_checkpoint(path, state)

    def _restore(self) -> None:
        if not self.folder.last_checkpoint.exists():
            self.folder.drop_metrics_after(0)
            return
        path = self.folder.last_checkpoint
        state = load_checkpoint(path, CHECKPOINT_ENTRIES)
        with reading(path, "a checkpoint of this run"):
            self.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.order.load_state_dict(state["order"])
            torch.set_rng_state(state["random"])
        self.step, self.last, self.best = state["step"], state["last"], state["best"]
        self._seconds_before = state["seconds"]
        self.folder.drop_metrics_after(self.step)

    def _summarize(self) -> Record:
        summary = {
            "epochs": self.config.optimizer.epochs,
            "steps": self.step,
            "last": self.last,
            "best": self.best,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": self.seconds,
        }
        self.folder.write_summary(summary)
        return summary
