"""What a training run is made of, as dataclasses: a recipe is one of these written in YAML."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FEATURES = "features"
NEIGHBORS = 5


def _require_at_least(minimum: int, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _require_seed(name: str, seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {seed}")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from.

    Args:
        name: a key of ``affkd_kernels.trainer.data.DATASETS``.
        batch_size: images a step.
        labels_per_class: how many labels a class keeps; null keeps all, 0 removes all. Images
            without a label still reach the teacher and the relational terms.
        labeled_batch: labeled images added to each step when only some images keep their label.
        split_seed: decides the train and test split; the same for every run that is compared.
        limit: keep only this many training images, for a quick try; at least five, because
            the evaluation asks for five neighbors.
    """

    name: str = "mnist5k"
    batch_size: int = 64
    labels_per_class: int | None = None
    labeled_batch: int = 32
    split_seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        _require_at_least(1, batch_size=self.batch_size, labeled_batch=self.labeled_batch)
        _require_at_least(NEIGHBORS, limit=self.limit)
        _require_at_least(0, labels_per_class=self.labels_per_class)
        _require_seed("split_seed", self.split_seed)


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are fitted.

    Args:
        name: ``adamw`` or ``sgd`` (Nesterov momentum 0.9).
        lr: the learning rate after the warm-up, annealed to 0 along a cosine.
        weight_decay: decoupled for ``adamw``, in the gradient for ``sgd``.
        epochs: passes over the training images.
        warmup: fraction of all steps over which the rate rises from 0.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 1e-4
    epochs: int = 6
    warmup: float = 0.05

    def __post_init__(self) -> None:
        _require_at_least(1, epochs=self.epochs)
        _require_at_least(0, lr=self.lr, weight_decay=self.weight_decay, warmup=self.warmup)
        if self.warmup > 1:
            raise ValueError(f"warmup must be a fraction of the steps, 0 to 1, got {self.warmup}")


@dataclass(frozen=True)
class TeacherConfig:
    """The network that is imitated.

    Args:
        model: a key of ``affkd_kernels.trainer.models.MODELS``.
        checkpoint: ``best.pt`` or ``last.pt`` of a run on the same data, split and limit; null
            trains the teacher first, in the folder ``teacher`` of the run.
        epochs: passes over the labeled training images when the teacher is trained here.
        cache: compute the teacher's outputs once, before the first step. Right as long as an
            image is the same in every epoch; costs memory for large feature maps.
    """

    model: str = "cnn_teacher"
    checkpoint: str | None = None
    epochs: int = 6
    cache: bool = True

    def __post_init__(self) -> None:
        _require_at_least(1, epochs=self.epochs)


@dataclass(frozen=True)
class SupervisionConfig:
    """The terms that are not relational.

    Args:
        cross_entropy: weight of the cross-entropy on the labeled images.
        kd: weight of Hinton's distillation term on all images (arXiv 1503.02531): temperature^2
            times KL(teacher || student) of the softened predictions.
        temperature: the softening.
    """

    cross_entropy: float = 1.0
    kd: float = 0.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


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
        student_feature: dotted path of the student's module whose output is compared.
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


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Args:
        out: the run folder; it must not exist yet, unless the run is resumed.
        student: a key of ``affkd_kernels.trainer.models.MODELS``.
        seed: seeds the weights, the data order and the choice of labels.
        data: where the images come from.
        optimizer: how the weights are fitted.
        teacher: the network that is imitated; used only where a term needs one.
        supervision: cross-entropy and Hinton's distillation.
        loss: a relational term.
        terms: further relational terms by name; ``cross_entropy`` and ``kd`` are taken.
        imports: modules to import first, from the current folder too: those that register
            components, data sets or networks of your own.
        device: anything ``torch.device`` takes.
        threads: CPU threads; null leaves the default. A resumed run repeats the interrupted one
            to the bit only with the same number.
        eval_every: epochs between evaluations, each followed by a checkpoint; the last epoch is
            always evaluated.
        log_every: steps between two lines of ``metrics.jsonl``.
        checkpoint_every: steps between further checkpoints; 0 writes none.
    """

    out: str = "runs/train"
    student: str = "cnn_student"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    loss: TermConfig = field(default_factory=TermConfig)
    terms: dict[str, TermConfig] = field(default_factory=dict)
    imports: list[str] = field(default_factory=list)
    device: str = "cpu"
    threads: int | None = None
    eval_every: int = 1
    log_every: int = 20
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        _require_at_least(
            1, eval_every=self.eval_every, log_every=self.log_every, threads=self.threads
        )
        _require_at_least(0, checkpoint_every=self.checkpoint_every)
        _require_seed("seed", self.seed)

    def relational_terms(self) -> dict[str, TermConfig]:
        """Every relational term by name; ``loss`` goes by its preset's name, or ``relation``."""
        if self.loss.empty:
            return dict(self.terms)
        name = self.loss.preset or "relation"
        if name in self.terms:
            raise ValueError(f"loss and terms both hold a term named {name!r}; rename one")
        return {name: self.loss, **self.terms}

    def needs_teacher(self) -> bool:
        return bool(self.supervision.kd or self.relational_terms())

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers, as they go into ``config.yaml``."""
        return asdict(self)
