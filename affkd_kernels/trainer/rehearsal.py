"""One batch ahead of a run: mistakes are told before anything is trained, and shares measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from affkd_kernels.components import Frobenius, RowL1, RowL2, RowSum, Softmax
from affkd_kernels.modules import AffinityLoss
from affkd_kernels.trainer.config import SupervisionConfig, TrainConfig
from affkd_kernels.trainer.data import ImageData
from affkd_kernels.trainer.models import Classifier, build_model
from affkd_kernels.trainer.networks import ObservedNetwork, Teacher, load_network
from affkd_kernels.trainer.objective import Objective, build_relation, build_term
from affkd_kernels.trainer.precision import Precision
from affkd_kernels.trainer.step import batch_order, initial_student, step_losses, with_changes

# below this part of the strongest term's gradient a term takes no part to speak of
WEAK = 0.01


def rehearse(config: TrainConfig, data: ImageData, objective: Objective) -> None:
    """Send one batch forward and backward through everything, with networks of its own.

    Raises whatever a run would only raise later: a module that a term finds nowhere, features of a
    shape that a loss does not take, a teacher's checkpoint that is none or of other data.
    """
    teacher = None
    if config.needs_teacher():
        network, paths = _teacher_network(config, data), config.teacher_features()
        precision = Precision(config.precision)
        teacher = Teacher(network, paths, data.train_images, cache=False, precision=precision)
    total, _ = _first_step(config, data, teacher, objective, initial_student(config, data))
    total.backward()


def _teacher_network(config: TrainConfig, data: ImageData) -> Classifier:
    checkpoint, name = config.teacher.checkpoint, config.teacher.model
    if checkpoint is None:
        model = build_model(name, data.train_images.channels, data.classes, config.seed)
        return model.to(data.train_images.device)
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"teacher.checkpoint must be a file, got {checkpoint!r}")
    return load_network(Path(checkpoint), name, data)


def _first_step(
    config: TrainConfig,
    data: ImageData,
    teacher: Teacher | None,
    objective: Objective,
    model: Classifier,
) -> tuple[Tensor, dict[str, Tensor]]:
    precision = Precision(config.precision)
    network = ObservedNetwork(model.train(), config.student_features(), precision)
    batch = with_changes(next(batch_order(config, data).epoch()), config, step=0)
    part = batch.part(0, config.accumulate)
    # a network that draws random numbers must not draw those of the run
    with torch.random.fork_rng(devices=[]):
        try:
            return step_losses(objective, network, teacher, data, part, config.data.crop_padding)
        finally:
            network.remove()


def gradient_shares(
    config: TrainConfig, data: ImageData, teacher: Teacher | None
) -> dict[str, Any]:
    """How hard each term pulls at the student's weights in the first batch.

    Returns:
        A record: ``shares`` maps a term's name to the norm of its gradient over the sum of all
        such norms, ``warnings`` has a sentence for each relational term that its normalization and
        its reduction together make vanish beside the others.
    """
    norms = {}
    for name, objective in _single_objectives(config):
        model = initial_student(config, data)
        total, _ = _first_step(config, data, teacher, objective, model)
        if total.requires_grad:
            total.backward()
            norms[name] = _gradient_norm(model)
    whole, strongest = sum(norms.values()) or 1.0, max(norms.values(), default=0.0)
    weak = {name: norm / strongest for name, norm in norms.items() if norm < WEAK * strongest}
    return {
        "kind": "gradient_shares",
        "epoch": 0,
        "step": 0,
        "shares": {name: norm / whole for name, norm in norms.items()},
        "warnings": list(_warnings(config, weak)),
    }


def _single_objectives(config: TrainConfig) -> Iterator[tuple[str, Objective]]:
    """The objective's terms, each as an objective of its own."""
    supervision = config.supervision
    yield "cross_entropy", Objective(replace(supervision, kd=0.0))
    yield "kd", Objective(replace(supervision, cross_entropy=0.0))
    for name, term in config.relational_terms().items():
        nothing = SupervisionConfig(cross_entropy=0.0)
        yield name, Objective(nothing, build_relation({name: term}))


def _gradient_norm(model: nn.Module) -> float:
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return math.sqrt(float(sum(squares)))


def _warnings(config: TrainConfig, weak: dict[str, float]) -> Iterator[str]:
    for name, term in config.relational_terms().items():
        loss = build_term(name, term)
        # a gradient of exactly 0 has another reason: a weight of 0, or networks that agree
        if not weak.get(name) or not isinstance(loss, AffinityLoss):
            continue
        cause = _vanishing(loss)
        if cause:
            yield f"term {name!r} pulls with {weak[name]:.1g} of the strongest term: {cause}"


def _vanishing(loss: AffinityLoss) -> str | None:
    """Why the term shrinks with the batch, and the reduction that does not; None where it does not.

    Entries divided by a sum over a row or a matrix are small already; a mean over as many entries
    divides a second time.
    """
    normalization, reduction = loss.spec.normalization, loss.spec.reduction
    if isinstance(normalization, Frobenius) and reduction in ("mean", "batchmean"):
        unit, remedy = "the matrix", "matrixmean"
    elif isinstance(normalization, (RowL1, RowL2, RowSum, Softmax)) and reduction == "mean":
        unit, remedy = "each row", "batchmean"
    else:
        return None
    return (
        f"{normalization.name} divides by a sum over {unit}, and reduction {reduction!r} by the "
        f"number of entries once more; take options: {{reduction: {remedy}}}, or a larger weight"
    )
