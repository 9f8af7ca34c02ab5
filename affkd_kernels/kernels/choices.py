"""Which stages a spec means to a kernel: the names and the numbers that all kernels share.

A cosine is linear in the inner product of directions, a shifted one has an offset too, an RBF by
its Taylor series is a polynomial of it, ...: six pair functions serve all affinities.
"""

from __future__ import annotations

from .. import components as c


def lower_bound(affinity: c.Affinity) -> float | None:
    """The bound of every entry from below, None where there is none.

    Rounding may leave a shifted cosine below 0, and a negative "probability" has no logarithm.
    """
    bound = affinity.clamp_min
    if isinstance(affinity, c.Cosine) and affinity.shifted:
        return max(bound or 0.0, 0.0)
    return bound


def unit(affinity: c.Affinity) -> bool:
    """Whether the affinity is one of directions x / |x|."""
    return isinstance(affinity, c.Cosine) or bool(getattr(affinity, "unit", False))


def pair_function(affinity: c.Affinity) -> str:
    if isinstance(affinity, c.RBF):
        return "gaussian" if affinity.taylor_order is None else "taylor"
    names: dict[type, str] = {
        c.Gram: "linear",
        c.Cosine: "linear",
        c.SqEuclidean: "squared_distance",
        c.Euclidean: "distance",
        c.Polynomial: "power",
    }
    return names[type(affinity)]


def order(affinity: c.Affinity) -> int:
    if isinstance(affinity, c.Polynomial):
        return affinity.degree
    return (affinity.taylor_order or 0) if isinstance(affinity, c.RBF) else 0


def scales(affinity: c.Affinity, dims: tuple[int, int]) -> tuple[float, float]:
    """The factor of g (of sq for a Gaussian) of student and teacher."""
    if isinstance(affinity, c.Gram):
        return affinity.scale_of("student", dims[0]), affinity.scale_of("teacher", dims[1])
    if isinstance(affinity, c.RBF):
        scale = affinity.gamma if affinity.taylor_order is None else 2 * affinity.gamma
    elif isinstance(affinity, c.Cosine):
        scale = 0.5 if affinity.shifted else 1.0
    else:
        scale = affinity.scale if isinstance(affinity, c.Polynomial) else 1.0
    return scale, scale


def offset(affinity: c.Affinity) -> float:
    if isinstance(affinity, c.Cosine):
        return 0.5 if affinity.shifted else 0.0
    return affinity.offset if isinstance(affinity, c.Polynomial) else 0.0


def normalization_kind(normalization: c.Normalization) -> str:
    if isinstance(normalization, c.Frobenius):
        return "frobenius_centered" if normalization.center else "frobenius"
    if isinstance(normalization, c.Mean):
        return f"mean_{normalization.over}"
    if isinstance(normalization, c.Max):
        return "max_detached" if normalization.detach else "max"
    return normalization.name


def loss_kind(loss: c.Loss) -> str:
    return f"kl_{loss.direction}" if isinstance(loss, c.KL) else loss.name
