"""What a run minimizes: cross-entropy, Hinton's distillation and the relational terms, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affkd_kernels.modules import AffinityLoss
from affkd_kernels.multi import MultiLoss, non_finite_terms
from affkd_kernels.presets import preset
from affkd_kernels.trainer.config import SupervisionConfig, TermConfig


class Outputs(NamedTuple):
    """What a network says about some images: logits [B, classes] and features by dotted path."""

    logits: Tensor
    features: dict[str, Tensor]

    def first(self, count: int) -> Outputs:
        """The outputs for the first ``count`` images alone."""
        return Outputs(self.logits[:count], {k: v[:count] for k, v in self.features.items()})


class Shares(NamedTuple):
    """Factors of the terms where a step is computed in parts: each part's share of the whole."""

    cross_entropy: float = 1.0
    kd: float = 1.0
    relation: float = 1.0


WHOLE = Shares()
SUPERVISED = ("cross_entropy", "kd")
Relation = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(teacher || student) of softened predictions, averaged over the batch.

    Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), section 2; the square keeps the gradient's
    size independent of the temperature.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def build_term(name: str, term: TermConfig, group: Any = None) -> nn.Module:
    """The loss module of one relational term.

    Args:
        group: the processes whose rows together are the batch; None is this process alone.

    Raises:
        ValueError: where the term names both a preset and a triple, or neither; and whatever
            ``affkd_kernels.preset`` and ``AffinityLoss`` raise for an invalid one.
    """
    triple = {
        "affinity": term.affinity,
        "normalization": term.normalization,
        "loss": term.loss,
    }
    given: dict[str, Any] = {k: v for k, v in triple.items() if v is not None}
    options = dict(term.options)
    if term.weight is not None:
        options["weight"] = term.weight
    if group is not None:
        options["process_group"] = group
    if term.preset is not None:
        if given:
            raise ValueError(
                f"term {name!r} has preset={term.preset!r} and {', '.join(given)}; "
                "a preset fixes the triple, so give one or the other"
            )
        return preset(term.preset, **options)
    if "affinity" not in given:
        raise ValueError(f"term {name!r} needs a preset or an affinity")
    return AffinityLoss(**given, **options)


def build_relation(terms: Mapping[str, TermConfig], group: Any = None) -> Relation:
    """All relational terms as one callable on the captured features of student and teacher.

    Raises:
        ValueError: a term that takes the name of a supervised one; and what ``build_term`` raises.
    """
    for name in terms:
        if name in SUPERVISED:
            raise ValueError(
                f"a relational term cannot be named {name!r}: the metrics hold another term by "
                f"that name (taken: {', '.join(SUPERVISED)})"
            )
    return MultiLoss(
        {
            name: (build_term(name, term, group), term.student_feature, term.teacher_feature)
            for name, term in terms.items()
        }
    )


class Objective:
    """The sum of all terms of a step, and each by its name."""

    def __init__(self, supervision: SupervisionConfig, relation: Relation | None = None) -> None:
        self.supervision = supervision
        self.relation = relation

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labeled_logits: Tensor,
        labels: Tensor,
        shares: Shares = WHOLE,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and the detached weighted terms.

        Args:
            student: outputs for all images of the step, labeled or not.
            teacher: the same of the teacher; None where no term needs it.
            labeled_logits: [L, classes], of the images that keep their label; L may be 0.
            labels: [L] int64.
            shares: what these images are of the whole step's.
        """
        weights = self.supervision
        total = labeled_logits.new_zeros(())
        terms: dict[str, Tensor] = {}
        if weights.cross_entropy and len(labels):
            loss = F.cross_entropy(labeled_logits, labels)
            terms["cross_entropy"] = weights.cross_entropy * shares.cross_entropy * loss
            total = total + terms["cross_entropy"]
        if weights.kd and teacher is not None:
            softened = distillation(student.logits, teacher.logits, weights.temperature)
            terms["kd"] = weights.kd * shares.kd * softened
            total = total + terms["kd"]
        if self.relation is not None and teacher is not None:
            related, named = self.relation(student.features, teacher.features)
            terms |= {name: shares.relation * value for name, value in named.items()}
            total = total + shares.relation * related
        return total, {name: value.detach() for name, value in terms.items()}


class NonFiniteLossError(RuntimeError):
    """A term became inf or NaN. ``terms`` maps its name to its value, ``step`` says when."""

    def __init__(self, terms: dict[str, float], step: int, place: str = "at") -> None:
        self.terms = terms
        self.step = step
        listed = ", ".join(f"{name} = {value}" for name, value in terms.items())
        super().__init__(f"non-finite loss {place} step {step}: {listed}")


def require_finite(total: Tensor, terms: dict[str, Tensor], step: int) -> None:
    """Raise ``NonFiniteLossError`` that names the terms which are inf or NaN."""
    if torch.isfinite(total):
        return
    # finite terms can have a sum that overflows: then the sum itself is to blame
    named = {name: terms[name].item() for name in non_finite_terms(terms)}
    raise NonFiniteLossError(named or {"total": total.item()}, step)


def require_finite_scores(scores: dict[str, float], step: int) -> None:
    """The same for an evaluation: the last step before it can have broken the weights."""
    broken = {name: score for name, score in scores.items() if not math.isfinite(score)}
    if broken:
        raise NonFiniteLossError(broken, step, "in the evaluation after")
