"""The main effect of each module: what a level adds to a triple, whatever the other two are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Triple = tuple[str, str, str]
MODULES = ("affinity", "normalization", "loss")


@dataclass(frozen=True)
class ModuleMap:
    """A module's adjusted level means as linear functions of the triples' scores: [levels, T]."""

    module: str
    levels: list[str]
    rows: Array

    @property
    def scales(self) -> Array:
        """[levels]: the noise of each mean, where that of one triple is 1."""
        return np.sqrt((self.rows**2).sum(1))


def module_maps(triples: Sequence[Triple]) -> list[ModuleMap]:
    """The modules whose effects these triples determine.

    Not every combination is valid, so the plain mean over the triples of a level would mix its
    effect with those of the company it keeps. The means are adjusted for that: least squares of the
    additive model, score = constant + affinity + normalization + loss, with effects that sum to 0
    over the levels of each module. A module of one level, or one that is never varied while another
    is held, is left out.
    """
    if not triples:
        return []
    levels = [list(dict.fromkeys(triple[i] for triple in triples)) for i in range(3)]
    design, columns = _design(triples, levels)
    inverse = np.linalg.pinv(design)  # [P, T]
    maps = []
    for index, module in enumerate(MODULES):
        count = len(levels[index])
        coding = np.zeros((count, design.shape[1]))
        coding[:, columns[index]] = _sum_coding(count)
        # a combination of parameters is determined where it is one of the rows of the design
        determined = np.allclose(coding @ inverse @ design, coding)
        if count > 1 and determined:
            coding[:, 0] = 1
            maps.append(ModuleMap(module, levels[index], coding @ inverse))
    return maps


def _design(
    triples: Sequence[Triple], levels: Sequence[Sequence[str]]
) -> tuple[Array, list[slice]]:
    blocks, columns, start = [np.ones((len(triples), 1))], [], 1
    for index, names in enumerate(levels):
        coding = _sum_coding(len(names))
        blocks.append(coding[[names.index(triple[index]) for triple in triples]])
        columns.append(slice(start, start + len(names) - 1))
        start += len(names) - 1
    return np.hstack(blocks), columns


def _sum_coding(count: int) -> Array:
    """[levels, levels - 1]: parameters to effects that sum to 0."""
    return np.vstack([np.eye(count - 1), -np.ones(count - 1)])


def additive_part(triples: Sequence[Triple], means: Array) -> float | None:
    """The part of the variance between the triples' means [T] that the main effects make up.

    None where nothing is left to tell it by: as many parameters as triples, or no variance.
    """
    if not triples:
        return None
    levels = [list(dict.fromkeys(triple[i] for triple in triples)) for i in range(3)]
    design, _ = _design(triples, levels)
    spread = means - means.mean()
    if np.linalg.matrix_rank(design) >= len(triples) or not spread.any():
        return None
    rest = means - design @ np.linalg.lstsq(design, means, rcond=None)[0]
    return float(1 - (rest @ rest) / (spread @ spread))
