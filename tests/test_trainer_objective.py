"""The terms of a step, the learning rate and the neighbor search, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from affkd_kernels.trainer.balance import balanced_terms
from affkd_kernels.trainer.config import (
    FEATURES,
    DataConfig,
    OptimizerConfig,
    SupervisionConfig,
    TermConfig,
    TrainConfig,
)
from affkd_kernels.trainer.data import load_data
from affkd_kernels.trainer.evaluate import neighbor_accuracy
from affkd_kernels.trainer.models import build_model
from affkd_kernels.trainer.networks import Teacher
from affkd_kernels.trainer.objective import (
    NonFiniteLossError,
    Objective,
    Outputs,
    build_term,
    distillation,
    require_finite,
)
from affkd_kernels.trainer.optimizer import build_optimizer, learning_rate
from affkd_kernels.trainer.step import batch_order, initial_student


def test_distillation_is_the_softened_divergence_and_leaves_the_teacher_alone():
    torch.manual_seed(0)
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    loss = distillation(student, teacher, 4.0)
    p, q = (torch.softmax(t.detach() / 4, 1) for t in (teacher, student))
    assert loss.item() == pytest.approx(16 * (p * (p / q).log()).sum().item() / 5)
    loss.backward()
    assert teacher.grad is None
    # d/dz of T^2 KL is T (q - p), averaged over the batch
    torch.testing.assert_close(student.grad, 4 * (q - p) / 5)


def test_the_objective_adds_weighted_terms_and_names_them():
    torch.manual_seed(0)
    student, teacher = (Outputs(torch.randn(6, 3), {}) for _ in range(2))
    labels = torch.tensor([0, 2])
    relation_value = torch.tensor(0.25)
    objective = Objective(
        SupervisionConfig(cross_entropy=0.5, kd=2.0, temperature=3.0),
        lambda s, t: (relation_value, {"relation": relation_value}),
    )
    total, terms = objective(student, teacher, student.logits[:2], labels)
    expected = {
        "cross_entropy": 0.5 * F.cross_entropy(student.logits[:2], labels),
        "kd": 2.0 * distillation(student.logits, teacher.logits, 3.0),
        "relation": relation_value,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(total, sum(expected.values()))


def test_no_labels_means_no_cross_entropy_rather_than_nan():
    objective = Objective(SupervisionConfig(kd=1.0))
    logits = torch.randn(4, 3)
    outputs = Outputs(logits, {})
    total, terms = objective(outputs, outputs, logits[:0], torch.empty(0, dtype=torch.int64))
    assert terms.keys() == {"kd"} and total.isfinite()


def test_a_sum_that_overflows_is_told_as_such():
    terms = {"a": torch.tensor(3e38), "b": torch.tensor(3e38)}
    with pytest.raises(NonFiniteLossError, match="step 7: total = inf"):
        require_finite(sum(terms.values()), terms, 7)
    require_finite(torch.tensor(1.0), terms, 7)


@pytest.mark.parametrize("weight", [None, 0.5, 1.0])
def test_balanced_weights_pull_as_hard_as_cross_entropy_whatever_they_start_from(weight):
    config = TrainConfig(data=DataConfig("digits", limit=64))
    data = load_data(config.data)
    teacher = Teacher(build_model("cnn_teacher", 1, 10, 1), [FEATURES], data.train_images)
    terms = {"cka": TermConfig("cka", weight=weight)}
    balanced = balanced_terms(terms, config, data, teacher, batches=1)
    student = initial_student(config, data)
    rows = next(batch_order(config, data).epoch()).rows
    images = data.train_images[rows]
    features = student.features(images)
    cross_entropy = F.cross_entropy(student.head(features), data.train_labels[rows])
    target = teacher(rows, images).features[FEATURES]
    relation = build_term("cka", balanced["cka"])(features, target)
    (pull,) = torch.autograd.grad(relation, features, retain_graph=True)
    (wanted,) = torch.autograd.grad(cross_entropy, features)
    assert pull.norm().item() == pytest.approx(wanted.norm().item(), rel=1e-4)


def test_a_weight_of_zero_is_not_taken_for_none():
    config = TrainConfig(data=DataConfig("digits", limit=64))
    data = load_data(config.data)
    teacher = Teacher(build_model("cnn_teacher", 1, 10, 1), [FEATURES], data.train_images)
    with pytest.raises(ValueError, match="exactly zero"):
        balanced_terms({"cka": TermConfig("cka", weight=0.0)}, config, data, teacher, batches=1)


def test_learning_rate_warms_up_and_ends_near_zero():
    config = OptimizerConfig(lr=2.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert all(later < earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))


def test_an_unknown_optimizer_is_named_with_the_valid_ones():
    model = build_model("cnn_student", 1, 10, 0)
    assert isinstance(build_optimizer(model, OptimizerConfig("sgd")), torch.optim.SGD)
    with pytest.raises(ValueError, match="'lion'.*adamw, sgd"):
        build_optimizer(model, OptimizerConfig("lion"))


def test_a_stepped_learning_rate_falls_after_its_milestones():
    config = OptimizerConfig(
        lr=2.0, warmup=0.0, epochs=10, schedule="step", milestones=[5, 8], decay=0.5
    )
    # three steps an epoch
    rates = [learning_rate(config, step, 30) for step in range(30)]
    assert rates == [2.0] * 15 + [1.0] * 9 + [0.5] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step", "milestones": [5, 2]}, "ascending epochs from 1, got"),
        ({"schedule": "step", "milestones": [0]}, "ascending epochs from 1"),
        ({"milestones": [3]}, "belong to schedule 'step', got 'cosine'"),
        ({"decay": -1.0}, "decay must be at least 0"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_neighbor_accuracy_agrees_with_a_loop():
    torch.manual_seed(0)
    gallery, queries = torch.randn(60, 4), torch.randn(40, 4)
    labels, wanted = torch.randint(0, 3, (60,)), torch.randint(0, 3, (40,))
    right = 0
    for query, label in zip(queries, wanted, strict=True):
        nearest = (gallery - query).square().sum(1).argsort()[:5]
        right += int(labels[nearest].bincount(minlength=3).argmax() == label)
    assert neighbor_accuracy(gallery, labels, queries, wanted) == pytest.approx(100 * right / 40)
