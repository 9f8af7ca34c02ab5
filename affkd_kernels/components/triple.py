"""Which triples are valid (docs/semantics.md)."""

from __future__ import annotations

from .affinity import Affinity
from .loss import Loss
from .normalization import Normalization, Softmax

NONNEGATIVE = (
    "cosine(shifted=True), sqeuclidean, euclidean, rbf (exact, or an even taylor_order), "
    "polynomial of even degree, or any affinity with clamp_min >= 0"
)


def check_triple(affinity: Affinity, normalization: Normalization, loss: Loss) -> None:
    """Raise a ValueError that names what would be valid, unless the triple is."""
    if normalization.needs_nonnegative and not affinity.nonnegative:
        raise ValueError(
            f"normalization {normalization} needs a non-negative affinity, got "
            f"{affinity}; valid: {NONNEGATIVE}"
        )
    softmax = type(normalization) is Softmax
    if loss.needs_softmax and not softmax:
        raise ValueError(f"loss {loss.name!r} needs normalization 'softmax', got {normalization}")
    if loss.needs_distribution and not softmax:
        if not normalization.distribution:
            raise ValueError(
                f"loss {loss.name!r} compares distributions, and {normalization} gives none; valid "
                "normalizations: 'softmax', or 'row_sum' or 'row_l1' of a non-negative affinity"
            )
        if not affinity.nonnegative:
            raise ValueError(
                f"loss {loss.name!r} with normalization {normalization.name!r} needs a "
                f"non-negative affinity, got {affinity}; valid: {NONNEGATIVE}; "
                "or normalization 'softmax'"
            )
