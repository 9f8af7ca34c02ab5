"""What a training run is made of, as dataclasses: a recipe is one of these written in YAML."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from affkd_kernels.trainer.terms import FEATURES, TermConfig, on_stages

__all__ = [
    "FEATURES",
    "DataConfig",
    "OptimizerConfig",
    "SupervisionConfig",
    "TeacherConfig",
    "TermConfig",
    "TrainConfig",
]

NEIGHBORS = 5
Precision = Literal["float32", "bfloat16", "float16"]


def _require_at_least(minimum: int, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _require_fraction(name: str, value: float, below: float = 1.0) -> None:
    if not 0 <= value <= below:
        raise ValueError(f"{name} must be a fraction, 0 to {below:g}, got {value}")


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
        validation: fraction of the training images that is held out and takes the place of the test
            images, for choosing a weight without looking at those.
        root: the folder that holds ``cifar-10-batches-py`` or ``cifar-100-python`` (or their tar),
            or the ``train`` and ``test`` trees of the data set ``folder``.
        verify: compare CIFAR's files with the published checksums; false takes other data in the
            same format.
        image_size: side in pixels that the images of ``folder`` are scaled and cropped to.
        crop_padding: pixels of black on each side before a random crop of the old size; 0: none.
        flip: mirror half of the images.
    """

    name: str = "mnist5k"
    batch_size: int = 64
    labels_per_class: int | None = None
    labeled_batch: int = 32
    split_seed: int = 0
    limit: int | None = None
    validation: float = 0.0
    root: str = "data"
    verify: bool = True
    image_size: int = 32
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        _require_at_least(
            1,
            batch_size=self.batch_size,
            labeled_batch=self.labeled_batch,
            image_size=self.image_size,
        )
        _require_at_least(NEIGHBORS, limit=self.limit)
        _require_at_least(0, labels_per_class=self.labels_per_class, crop_padding=self.crop_padding)
        _require_fraction("validation", self.validation, below=0.9)
        _require_seed("split_seed", self.split_seed)

    @property
    def augmented(self) -> bool:
        """True where an image differs from epoch to epoch."""
        return bool(self.crop_padding or self.flip)


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are fitted.

    Args:
        name: ``adamw`` or ``sgd`` (momentum 0.9).
        lr: the learning rate after the warm-up.
        weight_decay: decoupled for ``adamw``, in the gradient for ``sgd``.
        epochs: passes over the training images.
        warmup: fraction of all steps over which the rate rises from 0.
        schedule: ``cosine`` anneals the rate to 0, ``step`` multiplies it by ``decay`` after each
            of the ``milestones``.
        milestones: finished epochs, ascending.
        decay: a factor.
        nesterov: Nesterov's form of the momentum of ``sgd``.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 1e-4
    epochs: int = 6
    warmup: float = 0.05
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: list[int] = field(default_factory=list)
    decay: float = 0.1
    nesterov: bool = True

    def __post_init__(self) -> None:
        _require_at_least(1, epochs=self.epochs)
        _require_at_least(0, lr=self.lr, weight_decay=self.weight_decay, decay=self.decay)
        _require_fraction("warmup", self.warmup)
        if self.milestones != sorted(set(self.milestones)) or min(self.milestones, default=1) < 1:
            raise ValueError(f"milestones must be ascending epochs from 1, got {self.milestones}")
        if self.milestones and self.schedule != "step":
            raise ValueError(f"milestones belong to schedule 'step', got {self.schedule!r}")


@dataclass(frozen=True)
class TeacherConfig:
    """The network that is imitated.

    Args:
        model: a key of ``affkd_kernels.trainer.models.MODELS``, ``torchvision:NAME`` or
            ``timm:NAME``.
        checkpoint: ``best.pt`` or ``last.pt`` of a run on the same data, split and limit; null
            trains the teacher first, in the folder ``teacher`` of the run.
        epochs: passes over the labeled training images when the teacher is trained here.
        lr: its learning rate when it is trained here; null is that of ``optimizer``.
        cache: compute the teacher's outputs once, before the first step; costs memory for large
            feature maps. null does so unless the images are augmented, and then it would be wrong.
    """

    model: str = "cnn_teacher"
    checkpoint: str | None = None
    epochs: int = 6
    lr: float | None = None
    cache: bool | None = None

    def __post_init__(self) -> None:
        _require_at_least(1, epochs=self.epochs)
        _require_at_least(0, lr=self.lr)


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
class TrainConfig:
    """One training run.

    Args:
        out: the run folder; it must not exist yet, unless the run is resumed.
        student: a key of ``affkd_kernels.trainer.models.MODELS``, ``torchvision:NAME`` or
            ``timm:NAME``.
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
        precision: ``bfloat16`` and ``float16`` run the networks under autocast, the latter with a
            scaled loss; the losses compute in float32 whatever this is.
        compile: run the student through ``torch.compile``.
        channels_last: keep the student's weights and the images in that memory format.
        deterministic: refuse algorithms that do not repeat to the bit, as some do on a GPU.
        accumulate: parts that a batch is taken in, to save memory. The gradient is that of the
            whole batch for cross-entropy and KD; a relation is that within each part.
        eval_every: epochs between evaluations, each followed by a checkpoint; the last epoch is
            always evaluated.
        neighbors: whether ``every`` evaluation counts neighbors, which takes a pass over the
            training images, or the ``last`` alone.
        log_every: steps between two lines of ``metrics.jsonl``.
        checkpoint_every: steps between further checkpoints; 0 writes none.
        tensorboard: write the metrics for TensorBoard too, into the run folder.
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
    precision: Precision = "float32"
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False
    accumulate: int = 1
    eval_every: int = 1
    neighbors: Literal["every", "last"] = "every"
    log_every: int = 20
    checkpoint_every: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _require_at_least(
            1,
            eval_every=self.eval_every,
            log_every=self.log_every,
            threads=self.threads,
            accumulate=self.accumulate,
        )
        _require_at_least(0, checkpoint_every=self.checkpoint_every)
        _require_seed("seed", self.seed)
        if self.teacher.cache and self.data.augmented:
            raise ValueError(
                "teacher.cache is true, but data.crop_padding or data.flip changes the images in "
                "every epoch; leave it null or false"
            )

    def asked_terms(self) -> dict[str, TermConfig]:
        """The relational terms by name; ``loss`` goes by its preset's name, or ``relation``."""
        if self.loss.empty:
            return dict(self.terms)
        name = self.loss.preset or "relation"
        if name in self.terms:
            raise ValueError(f"loss and terms both hold a term named {name!r}; rename one")
        return {name: self.loss, **self.terms}

    def relational_terms(self) -> dict[str, TermConfig]:
        """The same with a term on ``stages`` as one for each pair of them: what a step computes."""
        terms: dict[str, TermConfig] = {}
        for name, term in self.asked_terms().items():
            for own_name, own in on_stages(name, term, self.student, self.teacher.model).items():
                if own_name in terms:
                    raise ValueError(f"two terms are named {own_name!r}; rename one")
                terms[own_name] = own
        return terms

    def student_features(self) -> set[str]:
        """The modules of the student that the terms compare."""
        return {term.student_feature for term in self.relational_terms().values()}

    def teacher_features(self) -> set[str]:
        """The modules of the teacher that the terms compare."""
        return {term.teacher_feature for term in self.relational_terms().values()}

    def needs_teacher(self) -> bool:
        return bool(self.supervision.kd or self.asked_terms())

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers, as they go into ``config.yaml``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """What ``to_dict`` gave, as a configuration again."""
        parts = {
            "data": DataConfig,
            "optimizer": OptimizerConfig,
            "teacher": TeacherConfig,
            "supervision": SupervisionConfig,
            "loss": TermConfig,
        }
        built: dict[str, Any] = {name: part(**values[name]) for name, part in parts.items()}
        built["terms"] = {name: TermConfig(**term) for name, term in values["terms"].items()}
        return cls(**{**values, **built})
