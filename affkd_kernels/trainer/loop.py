"""The training loop: the state of a run, its steps, its evaluations, interruptible anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from affkd_kernels.trainer.config import TrainConfig
from affkd_kernels.trainer.cost import peak_memory, relation_milliseconds, synchronize
from affkd_kernels.trainer.data import Batch, ImageData
from affkd_kernels.trainer.errors import reading
from affkd_kernels.trainer.evaluate import evaluate
from affkd_kernels.trainer.networks import ObservedNetwork
from affkd_kernels.trainer.objective import (
    NonFiniteLossError,
    Objective,
    require_finite,
    require_finite_scores,
)
from affkd_kernels.trainer.optimizer import build_optimizer, learning_rate, set_learning_rate
from affkd_kernels.trainer.precision import Precision, random_state, set_random_state
from affkd_kernels.trainer.processes import ALONE, Processes
from affkd_kernels.trainer.run_folder import RunFolder, load_checkpoint, save_checkpoint
from affkd_kernels.trainer.step import (
    TeacherAnswers,
    batch_order,
    initial_student,
    own_part,
    step_losses,
    with_changes,
)

Record = dict[str, Any]
Observer = Callable[[Record], None]
CHECKPOINT_ENTRIES = (
    *("weights", "optimizer", "scaler", "order", "random"),
    *("step", "last", "best", "seconds"),
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
        processes: Processes = ALONE,
    ) -> None:
        self.config = config
        self.folder = folder
        self.data = data
        self.objective = objective
        self.teacher = teacher
        self.observe = observe
        self.processes = processes
        self.device = data.train_images.device
        # by rank, or a network that draws random numbers would draw the same everywhere
        torch.manual_seed(config.seed + processes.rank)
        self.model = initial_student(config, data)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.precision = Precision(config.precision)
        self.scaler = self.precision.scaler(self.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.order = batch_order(config, data, smallest=processes.count * config.accumulate)
        self.total_steps = self.order.steps_per_epoch * config.optimizer.epochs
        self.step = 0
        self.last: Record = {}
        self.best: Record = {}
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        # of this attempt alone
        self._steps_taken, self._step_seconds = 0, 0.0

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
        network = ObservedNetwork(
            self.processes.wrap(self.model),
            self.config.student_features(),
            self.precision,
            self.config.compile,
        )
        try:
            while self.step < self.total_steps:
                self._train_to_end_of_epoch(network)
                self._finish_epoch()
            return self._summarize(network)
        finally:
            network.remove()

    def _train_to_end_of_epoch(self, network: ObservedNetwork) -> None:
        self.model.train()
        every = self.config.checkpoint_every
        for batch in self.order.epoch():
            started = time.perf_counter()
            self._take_step(network, with_changes(batch, self.config, self.step))
            self._step_seconds += time.perf_counter() - started
            self._steps_taken += 1
            # a checkpoint at an epoch's last step would go on without that epoch's evaluation
            inside = self.step % self.order.steps_per_epoch != 0
            if every and self.step % every == 0 and inside:
                self._save_last()
        started = time.perf_counter()
        synchronize(self.device)
        self._step_seconds += time.perf_counter() - started

    def _take_step(self, network: ObservedNetwork, batch: Batch) -> None:
        rate = learning_rate(self.config.optimizer, self.step, self.total_steps)
        set_learning_rate(self.optimizer, rate)
        self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        for index in range(self.config.accumulate):
            for name, value in self._add_gradient(network, batch, index).items():
                terms[name] = terms[name] + value if name in terms else value
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.step % self.config.log_every == 0:
            self._record_terms(rate, terms)

    def _add_gradient(
        self, network: ObservedNetwork, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """Forward and backward of one part of the batch; its terms."""
        part, shares = own_part(batch, index, self.config.accumulate, self.processes)
        padding = self.config.data.crop_padding
        total, terms = step_losses(
            self.objective, network, self.teacher, self.data, part, padding, shares
        )
        with self._failure_recorded():
            require_finite(total, terms, self.step)
        self.scaler.scale(total).backward()
        return terms

    def _record_terms(self, rate: float, terms: dict[str, Tensor]) -> None:
        values = self.processes.mean({name: value.item() for name, value in terms.items()})
        self._record("train", rate=rate, total=sum(values.values()), terms=values)

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
        finished = self.step == self.total_steps
        if self.epoch % self.config.eval_every and not finished:
            return
        neighbors = finished or self.config.neighbors == "every"
        scores = self.processes.on_main(lambda: evaluate(self.model, self.data, neighbors))
        with self._failure_recorded():
            require_finite_scores(scores, self.step)
        self.last = {"epoch": self.epoch, "step": self.step, **scores}
        self._record("evaluation", **scores)
        if not self.best or scores["test_accuracy"] > self.best["test_accuracy"]:
            self.best = self.last
            if self.processes.main:
                save_checkpoint(self.folder.best_checkpoint, self._state())
        self._save_last()

    def _record(self, kind: str, **values: Any) -> None:
        if not self.processes.main:
            return
        place = {"kind": kind, "epoch": self.epoch, "step": self.step}
        record = {**place, **values, "seconds": self.seconds}
        self.folder.append_metrics(record)
        self.observe(record)

    def _save_last(self) -> None:
        if self.processes.main:
            save_checkpoint(self.folder.last_checkpoint, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.config.student,
            "data": self.data.identity,
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order": self.order.state_dict(),
            "random": random_state(self.device),
            "step": self.step,
            "last": self.last,
            "best": self.best,
            "seconds": self.seconds,
        }

    def _restore(self) -> None:
        if not self.processes.on_main(self.folder.last_checkpoint.exists):
            self._drop_metrics()
            return
        path = self.folder.last_checkpoint
        state = load_checkpoint(path, CHECKPOINT_ENTRIES)
        with reading(path, "a checkpoint of this run"):
            self.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.order.load_state_dict(state["order"])
            set_random_state(state["random"], self.device)
        self.step, self.last, self.best = state["step"], state["last"], state["best"]
        self._seconds_before = state["seconds"]
        self._drop_metrics()

    def _drop_metrics(self) -> None:
        if self.processes.main:
            self.folder.drop_metrics_after(self.step)

    def _summarize(self, network: ObservedNetwork) -> Record:
        summary = {
            "epochs": self.config.optimizer.epochs,
            "steps": self.step,
            "last": self.last,
            "best": self.best,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": self.seconds,
            "cost": self._cost(network),
        }
        # the others wait: what is written before may be the teacher that they load next
        self.processes.on_main(lambda: self.folder.write_summary(summary))
        return summary

    def _cost(self, network: ObservedNetwork) -> Record:
        """Of the part of the run that this attempt took, which may be nothing."""
        taken = self._steps_taken
        return {
            "step_milliseconds": 1e3 * self._step_seconds / taken if taken else None,
            "relation_milliseconds": self._relation_milliseconds(network),
            "peak_memory_mib": peak_memory(self.device),
        }

    def _relation_milliseconds(self, network: ObservedNetwork) -> float | None:
        """Of the relational terms of one batch."""
        if self.objective.relation is None or self.teacher is None:
            return None
        self.model.eval()
        rows = torch.arange(min(self.config.data.batch_size, len(self.data.train_labels)))
        own = rows[self.processes.rank :: self.processes.count]
        images = self.data.train_images[own]
        student, teacher = network(images), self.teacher(own, images)
        return relation_milliseconds(self.objective.relation, student.features, teacher.features)
