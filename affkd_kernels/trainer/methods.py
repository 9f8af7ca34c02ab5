"""The demo's rows, settings and columns: what is compared with what."""

from __future__ import annotations

from dataclasses import dataclass, field

from affkd_kernels.trainer.config import SupervisionConfig, TermConfig
from affkd_kernels.trainer.report import Column

ALL, FEW, NONE = "all labels", "10 labels a class", "no labels"
LABELS_PER_CLASS = {ALL: None, FEW: 10, NONE: 0}
HEAD, NEIGHBORS = "head", "5-NN"
COLUMNS = (
    Column(ALL, "accuracy", HEAD),
    Column(FEW, "accuracy", HEAD),
    Column(ALL, "neighbor_accuracy", NEIGHBORS),
    Column(FEW, "neighbor_accuracy", NEIGHBORS),
    Column(NONE, "neighbor_accuracy", NEIGHBORS),
)


@dataclass(frozen=True)
class Method:
    """A row of the table: what the student is trained with besides the labels there are."""

    name: str
    kd: bool = False
    terms: dict[str, TermConfig] = field(default_factory=dict)
    trained: bool = True

    def possible(self, setting: str) -> bool:
        """Without labels cross-entropy has nothing to learn from, and no training needs none."""
        return bool(self.kd or self.terms) or (setting == NONE) != self.trained

    def supervision(self, setting: str) -> SupervisionConfig:
        cross_entropy = 0.0 if setting == NONE else 1.0
        if not self.kd:
            return SupervisionConfig(cross_entropy=cross_entropy)
        # the mixture that the public comparisons use: 0.1 and 0.9 at temperature 4
        return SupervisionConfig(cross_entropy=0.1 * cross_entropy, kd=0.9, temperature=4.0)


METHODS = (
    Method("random init", trained=False),
    Method("CE"),
    Method("KD", kd=True),
    Method("CE + SP", terms={"sp": TermConfig("sp", weight=1.0)}),
    Method("CE + PKT", terms={"pkt": TermConfig("pkt", weight=1.0)}),
    Method(
        "CE + RKD",
        terms={
            "rkd_distance": TermConfig("rkd_distance", weight=25.0),
            "rkd_angle": TermConfig("rkd_angle", weight=50.0),
        },
    ),
    Method("CE + CKA", terms={"cka": TermConfig("cka", weight=1.0)}),
    Method("CE + RBF-Frobenius", terms={"rbf_frobenius": TermConfig("rbf_frobenius", weight=1.0)}),
)
