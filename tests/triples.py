"""Components and triples to test, and which of them the contract allows.

A `Part` names a component and its options without needing the package; `build()` makes the real
one. `valid_triples()` is every combination of the variants below that the contract allows,
`base_triples()` the same over the bare names.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

CLASS_NAMES = {
    "gram": "Gram",
    "cosine": "Cosine",
    "sqeuclidean": "SqEuclidean",
    "euclidean": "Euclidean",
    "rbf": "RBF",
    "polynomial": "Polynomial",
    "none": "NoNormalization",
    "row_l2": "RowL2",
    "row_l1": "RowL1",
    "row_sum": "RowSum",
    "softmax": "Softmax",
    "frobenius": "Frobenius",
    "mean": "Mean",
    "max": "Max",
    "mse": "MSE",
    "l1": "L1",
    "smooth_l1": "SmoothL1",
    "kl": "KL",
    "cross_entropy": "CrossEntropy",
}


class Part(NamedTuple):
    """One component: its name and the options that differ from the defaults."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        listed = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.name}({listed})" if listed else self.name

    @property
    def shorthand(self) -> str:
        """The string form the public functions take."""
        listed = ", ".join(f"{key}={value!r}" for key, value in self.options)
        return f"{self.name}({listed})" if listed else self.name

    def get(self, option: str, default: Any = None) -> Any:
        return dict(self.options).get(option, default)

    def build(self) -> Any:
        from affkd_kernels import components

        return getattr(components, CLASS_NAMES[self.name])(**dict(self.options))


def part(name: str, **options: Any) -> Part:
    return Part(name, tuple(options.items()))


AFFINITIES = (
    part("gram"),
    part("gram", student_scale=0.5, teacher_scale="1/sqrt(D)"),
    part("gram", clamp_min=0.0),
    part("cosine"),
    part("cosine", shifted=True),
    part("cosine", clamp_min=-0.25),
    part("sqeuclidean"),
    part("euclidean"),
    part("rbf"),
    part("rbf", gamma=0.15, unit=False),
    part("rbf", taylor_order=2),
    part("rbf", taylor_order=3),
    part("polynomial"),
    part("polynomial", degree=3, scale=0.5, offset=1.0),
    part("polynomial", degree=4, scale=0.7, offset=0.3, unit=True),
)
NORMALIZATIONS = (
    part("none"),
    part("row_l2"),
    part("row_l1"),
    part("row_sum"),
    part("softmax"),
    part("softmax", student_tau=0.5, teacher_tau=0.3),
    part("softmax", tau=2.0, axis="column"),
    part("softmax", tau=0.7, axis="both"),
    part("frobenius"),
    part("frobenius", center=True),
    part("mean"),
    part("mean", over="all"),
    part("mean", over="offdiag"),
    part("max"),
    part("max", detach=True),
)
LOSSES = (
    part("mse"),
    part("l1"),
    part("smooth_l1"),
    part("smooth_l1", beta=0.1),
    part("kl"),
    part("kl", direction="reverse"),
    part("kl", direction="symmetric"),
    part("cross_entropy"),
)


class Triple(NamedTuple):
    """An affinity, a normalization and a loss; `str` is the pytest id."""

    affinity: Part
    normalization: Part
    loss: Part

    def __str__(self) -> str:
        return "-".join(map(str, self))

    def build(self) -> tuple[Any, Any, Any]:
        return self.affinity.build(), self.normalization.build(), self.loss.build()

    @property
    def axis(self) -> str | None:
        """The softmax axis, None for any other normalization."""
        softmax = self.normalization.name == "softmax"
        return self.normalization.get("axis", "row") if softmax else None

    @property
    def forbids_sparse_pairs(self) -> bool:
        """True where neither `diagonal="exclude"` nor a `pair_mask` is allowed."""
        return self.axis in ("column", "both") or bool(self.normalization.get("center"))


def is_nonnegative(affinity: Part) -> bool:
    clamp = affinity.get("clamp_min")
    if clamp is not None and clamp >= 0:
        return True
    if affinity.name == "cosine":
        return bool(affinity.get("shifted"))
    if affinity.name == "rbf":
        return (affinity.get("taylor_order") or 0) % 2 == 0
    if affinity.name == "polynomial":
        return affinity.get("degree", 2) % 2 == 0
    return affinity.name in ("sqeuclidean", "euclidean")


def why_invalid(triple: Triple) -> str | None:
    """The component at fault ("normalization" or "loss"), None for a valid triple."""
    affinity, normalization, loss = triple
    nonnegative = is_nonnegative(affinity)
    if not nonnegative and (
        normalization.name == "row_sum"
        or (normalization.name == "mean" and normalization.get("over") in ("all", "offdiag"))
    ):
        return "normalization"
    if normalization.name == "softmax":
        return None
    if loss.name == "cross_entropy":
        return "loss"
    if loss.name == "kl" and not (nonnegative and normalization.name in ("row_sum", "row_l1")):
        return "loss"
    return None


def _triples(valid: bool, *variants: Iterable[Part]) -> list[Triple]:
    triples = (Triple(*parts) for parts in product(*variants))
    return [triple for triple in triples if (why_invalid(triple) is None) == valid]


def valid_triples() -> list[Triple]:
    return _triples(True, AFFINITIES, NORMALIZATIONS, LOSSES)


def invalid_triples() -> list[Triple]:
    return _triples(False, AFFINITIES, NORMALIZATIONS, LOSSES)


def _bare(parts: Iterable[Part]) -> list[Part]:
    return [one for one in parts if not one.options]


def base_triples() -> list[Triple]:
    """The valid triples of the bare names with their defaults."""
    return _triples(True, _bare(AFFINITIES), _bare(NORMALIZATIONS), _bare(LOSSES))


INVALID_COMPONENTS = (
    part("polynomial", degree=0),
    part("polynomial", degree=1.5),
    part("rbf", unit=False, taylor_order=2),
    part("softmax", axis="rows"),
    part("softmax", tau=0.0),
    part("mean", over="negative"),
    part("kl", direction="backward"),
    part("gram", scale="1/B"),
    part("smooth_l1", beta=-1.0),
)
