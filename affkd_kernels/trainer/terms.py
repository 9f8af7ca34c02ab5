"""A relational term as a recipe has it, and what a term on all stages stands for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from affkd_kernels.trainer.models.stages import STAGES, stage_pairs

FEATURES = "features"


@dataclass(frozen=True)
class TermConfig:
    """One relational term: a preset by name, or a triple of components.

    Args:
        preset: a name from ``affkd list``.
        affinity: a component string such as ``rbf(gamma=0.4)``.
        normalization: a component string such as ``frobenius``; null is ``none``.
        loss: a component string such as ``mse``, which is also what null means.
        weight: the loss's ``weight=``; null leaves its own, which is 1, or 0.5 for ``cka``, where
            it makes the formula 1 - CKA. ``affkd describe`` has the published weight of a preset,
            which belongs to a batch size and a network.
        student_feature: dotted path of the student's module whose output is compared. ``stages``
            on both sides makes one term of each pair of stages (``models/stages.py``), all of this
            weight, called ``name_1``, ``name_2`` and so on.
        teacher_feature: the same of the teacher.
        options: further keyword arguments of ``affkd_kernels.preset`` or ``AffinityLoss``.
    """

    preset: str | None = None
    affinity: str | None = None
    normalization: str | None = None
    loss: str | None = None
    weight: float | None = None
    student_feature: str = FEATURES
    teacher_feature: str = FEATURES
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """True where the term asks for nothing, as the default does."""
        return self == TermConfig()


def on_stages(name: str, term: TermConfig, student: str, teacher: str) -> dict[str, TermConfig]:
    """The term by its name; one on ``stages`` as a term for each pair of them.

    Args:
        student, teacher: the networks by the names that ``TrainConfig`` takes.

    Raises:
        ValueError: one side alone is on ``stages``, or the networks' stages do not go together.
    """
    sides = (term.student_feature, term.teacher_feature)
    if STAGES not in sides:
        return {name: term}
    if sides != (STAGES, STAGES):
        raise ValueError(
            f"term {name!r}: student_feature and teacher_feature must both be {STAGES!r} or "
            f"neither, got {sides[0]!r} and {sides[1]!r}"
        )
    return {
        f"{name}_{number}": replace(term, student_feature=ours, teacher_feature=theirs)
        for number, (ours, theirs) in enumerate(stage_pairs(student, teacher), start=1)
    }
