"""Intervals for differences within a study, from the spread of few seeds over many runs.

Runs of one seed share weights, data order and labels, so every comparison is made within a seed and
the seeds are what is resampled. Three or five seeds are too few to resample as they are: an
interval for a nominal 95 % would hold in far fewer cases. What is resampled instead are residuals,
pooled over everything that is compared, and the statistic is divided by its own standard error in
each draw (the bootstrap-t; Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 12).

Not everything is equally noisy, and few seeds tell a method's own noise badly, so its variance is
a mean of its own and of the pooled one (as in Smyth, Stat. Appl. Genet. Mol. Biol. 3, 2004, with
the weight of the latter fixed). Each draw does the same again, which is how the intervals know how
uncertain that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95
# observations that the pooled variance counts for beside a unit's own, of which there are S - 1
POOLED_WEIGHT = 2.0


@dataclass(frozen=True)
class Noise:
    """How far seeds alone move the means of units that share them.

    Args:
        seeds: S, how many each mean is of.
        pooled: standard deviation at one seed of a unit whose scale is 1, by all of them.
        own: [U], that of each unit by itself.
        spreads: [U], that of each unit as the intervals take it, between ``own`` and ``pooled``.
        drawn_means: [draws, U] of units that do not differ.
        drawn_spreads: [draws, U], the spreads that each draw would give.
    """

    seeds: int
    pooled: float
    own: Array
    spreads: Array
    drawn_means: Array
    drawn_spreads: Array

    def range(self) -> Array:
        """[draws]: the lead of the best unit over the worst where all are equal."""
        return np.ptp(self.drawn_means, axis=1)


@dataclass(frozen=True)
class Intervals:
    """Contrasts [K] with the half-widths of their intervals.

    ``half_width`` holds for one comparison looked at alone, ``simultaneous`` for all of the study.
    """

    estimates: Array
    half_width: Array
    simultaneous: Array


def estimate_noise(
    values: Array, scales: Array, generator: np.random.Generator, draws: int
) -> Noise:
    """The noise of units compared within seeds.

    Args:
        values: [S, U] with S >= 2 and U >= 2: the figure of each unit at each seed.
        scales: [U], standard deviations that the units have relative to each other by design.
        generator: makes the draws repeatable.
        draws: bootstrap samples.
    """
    pooled, own, spreads = _spreads(values, scales)
    pool = (_residuals(values, scales) * scales / np.where(spreads > 0, spreads, 1.0)).ravel()
    # residuals are smaller than the errors they stand for
    pool /= np.sqrt((pool**2).mean()) or 1.0
    drawn = _smoothed_draws(pool, (draws, *values.shape), generator) * spreads
    _, _, drawn_spreads = _spreads(drawn, scales)
    return Noise(len(values), float(pooled), own, spreads, drawn.mean(1), drawn_spreads)


def _smoothed_draws(pool: Array, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """Draws from residuals of unit variance and either sign, a little blurred.

    Of a handful of residuals a draw would often take the same one twice and find no spread at all;
    a normal kernel of Silverman's width, at the same variance, mends that (Silverman & Young,
    Biometrika 74, 1987).
    """
    width = min(1.0, 1.06 * len(pool) ** -0.2)
    taken = generator.choice(np.concatenate([pool, -pool]), shape)
    return np.sqrt(1 - width**2) * taken + width * pool.any() * generator.standard_normal(shape)


def _spreads(values: Array, scales: Array) -> tuple[Array, Array, Array]:
    """Of [.., S, U]: the pooled deviation [..], each unit's own and its compromise [.., U]."""
    seeds, units = values.shape[-2:]
    squares = (_residuals(values, scales) ** 2).sum(-2)  # [.., U]
    freedom = (seeds - 1) * (units - 1) / units
    pooled = squares.mean(-1) / freedom
    compromise = (POOLED_WEIGHT * pooled[..., None] + squares) / (POOLED_WEIGHT + freedom)
    return np.sqrt(pooled), scales * np.sqrt(squares / freedom), scales * np.sqrt(compromise)


def _residuals(values: Array, scales: Array) -> Array:
    """What is left of [.., S, U] without the seeds' and the units' means, over the scales."""
    centered = values - values.mean(-2, keepdims=True)
    weights = scales**-2 / (scales**-2).sum()
    return (centered - (centered @ weights)[..., None]) / scales


def intervals(
    values: Array, contrasts: Array, noise: Noise, families: int, confidence: float = CONFIDENCE
) -> Intervals:
    """Intervals for contrasts of the units' means.

    Args:
        values: [S, U], as the noise was estimated from.
        contrasts: [K, U]; the weights of each sum to 0, so that what a seed adds to all units
            cancels.
        noise: of these units.
        families: how many such families are looked at; the simultaneous intervals share the
            permitted error among them (Bonferroni).
        confidence: of each interval alone, and of all simultaneous ones together.
    """
    statistics = _studentized(
        np.abs(noise.drawn_means @ contrasts.T),
        _errors(noise.drawn_spreads, contrasts, noise.seeds),
    )  # [draws, K]
    alone = np.quantile(statistics, confidence)
    together = np.quantile(statistics.max(1), 1 - (1 - confidence) / families)
    errors = _errors(noise.spreads, contrasts, noise.seeds)
    return Intervals(contrasts @ values.mean(0), alone * errors, together * errors)


def _errors(spreads: Array, contrasts: Array, seeds: int) -> Array:
    """Standard errors [.., K] of contrasts [K, U] of means over the seeds."""
    return np.sqrt(spreads**2 @ (contrasts**2).T / seeds)


def pair_margins(noise: Noise, unit: int, families: int, confidence: float = CONFIDENCE) -> Array:
    """[U]: the difference from ``unit`` that counts where it was picked for being the best.

    It holds for every pair of units at once, whichever came out first (Tukey's comparison).
    """
    largest = np.zeros(len(noise.drawn_means))
    for other in range(len(noise.spreads)):
        statistics = _studentized(
            np.abs(noise.drawn_means - noise.drawn_means[:, [other]]),
            _pair_errors(noise.drawn_spreads, other, noise.seeds),
        )
        largest = np.maximum(largest, statistics.max(1))
    quantile = np.quantile(largest, 1 - (1 - confidence) / families)
    return quantile * _pair_errors(noise.spreads, unit, noise.seeds)


def _pair_errors(spreads: Array, unit: int, seeds: int) -> Array:
    return np.sqrt((spreads**2 + spreads[..., [unit]] ** 2) / seeds)


def _studentized(differences: Array, errors: Array) -> Array:
    """Over an error of 0 no difference is 0 and any other infinite."""
    ratios = np.where(differences > 0, np.inf, 0.0)
    return np.divide(differences, errors, out=ratios, where=errors > 0)
