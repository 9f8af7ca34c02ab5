"""What a study compares: ``affkd grid`` takes one of these written in YAML."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from affkd_kernels.trainer.config import TermConfig, TrainConfig

Score = Literal["test_accuracy", "neighbor_accuracy"]


@dataclass(frozen=True)
class PairConfig:
    """Two networks by the names that ``TrainConfig`` takes."""

    teacher: str
    student: str


@dataclass(frozen=True)
class SettingConfig:
    """One way to look at the data.

    Args:
        labels_per_class: as in ``DataConfig``; with 0 the cross-entropy is switched off.
        score: what is compared. A student that was trained without labels has no head to judge.
    """

    labels_per_class: int | None = None
    score: Score = "test_accuracy"


def _one_setting() -> dict[str, SettingConfig]:
    return {"all labels": SettingConfig()}


@dataclass(frozen=True)
class GridConfig:
    """The cross product of a study.

    Args:
        out: the folder of the study; it is continued where there is one.
        base: what all runs share; its ``out``, ``seed``, ``loss`` and ``terms`` are not used.
        pairs: teachers and students; none is the pair of ``base``.
        affinities, normalizations, losses: components, every valid triple of which is a method.
        methods: further methods by name, each of relational terms by name.
        shares: gradients of a method relative to that of cross-entropy at the initial weights
            (``affkd_kernels.suggest_weight``); of several, the validation images choose one.
        weights: factors of the methods' own weights, in place of shares.
        batch_sizes: none is that of ``base``.
        settings: ways to look at the data, by name.
        seeds: of the runs that are reported.
        selection_seeds: of the runs that choose a share or a weight.
        validation: fraction of the training images that those are judged by.
        jobs: runs at a time.
        launcher: a command line that starts a run, with ``{arguments}`` for what python is given,
            as in ``torchrun --nproc-per-node 4 {arguments}`` or ``srun python {arguments}``; null
            trains in processes of the grid itself.
    """

    out: str = "runs/grid"
    base: TrainConfig = field(default_factory=TrainConfig)
    pairs: list[PairConfig] = field(default_factory=list)
    affinities: list[str] = field(default_factory=list)
    normalizations: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    methods: dict[str, dict[str, TermConfig]] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    settings: dict[str, SettingConfig] = field(default_factory=_one_setting)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    selection_seeds: list[int] = field(default_factory=lambda: [0])
    validation: float = 0.2
    jobs: int = 1
    launcher: str | None = None

    def __post_init__(self) -> None:
        if bool(self.shares) == bool(self.weights):
            raise ValueError("give either shares or weights, at least one figure")
        if min(self.levels) <= 0:
            raise ValueError(f"shares and weights must be positive, got {self.levels}")
        for name in ("seeds", "selection_seeds", "settings"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")
        if not 0 < self.validation < 1 and len(self.levels) > 1:
            raise ValueError(f"validation must be a fraction above 0, got {self.validation}")
        if self.launcher is not None and "{arguments}" not in self.launcher:
            raise ValueError(f"launcher must contain {{arguments}}, got {self.launcher!r}")

    @property
    def levels(self) -> list[float]:
        """The shares or the weights, whichever were given."""
        return self.shares or self.weights

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
