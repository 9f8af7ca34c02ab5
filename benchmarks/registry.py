"""The cases: which loss, on which shapes and dtypes, compared with what, in which suites."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from . import eager

# the families of providers a case may ask for; ours are always there
EAGER, COMPILE, CHUNKED, KEOPS = "eager", "compile", "chunked", "keops"
# of interest on a GPU: compilation that tries kernels, and blocks with compiled gradients
MAX_AUTOTUNE, LIGER = "compile-max-autotune", "liger"
# the package's own eager path, of interest where a kernel replaces it for good
REFERENCE = "reference"


@dataclass(frozen=True)
class Method:
    """A loss: the package's preset of the same name and the forms it is compared with.

    Attributes:
        name: the preset.
        eager: the loss as its users write it.
        variants: further eager forms, by the suffix of their provider's name.
        layout: what the first axis of the features means: "samples" [B, ...], "tokens"
            [..., L, D], "pixels" and "channels" [N, C, H, W].
        trained_keys: the student's keys get a gradient too.
        pairs: whether the loss is one over pairs, for which the floor makes sense.
    """

    name: str
    eager: Callable[..., Tensor]
    variants: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    layout: str = "samples"
    trained_keys: bool = False
    pairs: bool = True


METHODS = {
    method.name: method
    for method in (
        Method("sp", eager.sp, {"features": eager.sp_features}),
        Method("sp_frobenius", eager.sp_frobenius),
        Method("pkt", eager.pkt),
        Method("rkd_distance", eager.rkd_distance, {"published": eager.rkd_distance_published}),
        Method("rkd_angle", eager.rkd_angle, pairs=False),
        Method("cc", eager.cc),
        Method("cka", eager.cka, {"features": eager.cka_features}),
        Method("rbf_frobenius", eager.rbf_frobenius),
        Method("irg_edge", eager.irg_edge),
        Method("gram_anchor", eager.gram_anchor, layout="tokens"),
        Method("nst", eager.nst, layout="pixels"),
        Method("ickd", eager.ickd, layout="channels"),
        Method("seed", eager.seed),
        Method("compress", eager.compress),
        Method("minilm_v2", eager.minilm_v2, layout="tokens"),
        Method("clip_affinity", eager.clip_affinity, trained_keys=True),
    )
}


@dataclass(frozen=True)
class Case:
    """One loss on one set of shapes.

    Attributes:
        method: a key of `METHODS`.
        shape: of the student's and of the teacher's features.
        regime: the group whose ratios are summarized together.
        suites: the suites that contain it.
        against: families of baselines, besides the package's own algorithms.
        bank: keys [bank, D], 0 for a self-affinity.
        masked: the last quarter of the items of every second matrix is padding.
        channels_last: memory format of maps [N, C, H, W].
        dtype: of the features.
        precision: of float32 products, where one below "highest" is compared with it.
        memory: measure the peak memory too, each provider in a process of its own.
        tuned: measure the times again with an allocator that keeps its pages.
        seconds: time for the rounds; at least three rounds are run.
    """

    method: str
    shape: tuple[int, ...]
    regime: str
    suites: tuple[str, ...]
    against: tuple[str, ...] = (EAGER, COMPILE)
    bank: int = 0
    masked: bool = False
    channels_last: bool = False
    dtype: str = "float32"
    precision: str = "highest"
    memory: bool = False
    tuned: bool = False
    seconds: float = 2.0

    @property
    def name(self) -> str:
        parts = [self.method, "x".join(map(str, self.shape))]
        parts += [f"bank{self.bank}"] if self.bank else []
        parts += ["masked"] if self.masked else []
        parts += ["channels_last"] if self.channels_last else []
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [self.precision] if self.precision != "highest" else []
        return "-".join(parts)

    @property
    def extent(self) -> tuple[int, int, int, int]:
        """Matrices, queries, keys and feature length: N, Q, K, D."""
        layout, shape = METHODS[self.method].layout, self.shape
        if layout == "tokens":
            *lead, queries, length = shape
            return math.prod(lead), queries, queries, length
        if layout == "samples":
            queries, length = shape[0], math.prod(shape[1:])
            return 1, queries, self.bank or queries, length
        n, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
        queries, length = (pixels, channels) if layout == "pixels" else (channels, pixels)
        return n, queries, queries, length

    def shrunk(self) -> Case:
        """The same call on few items, to warm up what is not the call's own."""
        items = min(self.shape[0], 512 if len(self.shape) == 2 else 2)
        bank = min(self.bank, 512)
        return replace(self, shape=(items, *self.shape[1:]), bank=bank)


# minutes after which a suite starts no further case
SUITES = {"quick": 1.5, "cpu": 35.0, "gpu": 7.0, "large": 60.0, "factored": 12.0}

LINEAR = ("sp", "cka", "sp_frobenius", "gram_anchor")
NONLINEAR = ("pkt", "rkd_distance", "rbf_frobenius")
OF_SAMPLES = (*LINEAR, *NONLINEAR, "cc", "irg_edge", "rkd_angle")


def _small() -> list[Case]:
    """Everyday batches: every preset."""
    cases = []
    for batch, length in ((64, 64), (128, 512), (256, 256)):
        for method in OF_SAMPLES:
            quick = batch != 128 and method in ("sp", "pkt", "rkd_distance")
            suites = ("quick", "cpu") if quick else ("cpu",)
            cases.append(Case(method, (batch, length), "small", suites, seconds=1.5))
    others: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
        ("nst", (64, 64, 8, 8), {}),
        ("ickd", (64, 64, 8, 8), {}),
        ("seed", (64, 128), {"bank": 4096}),
        ("minilm_v2", (8, 12, 64, 64), {"masked": True}),
        ("clip_affinity", (256, 256), {"bank": 256}),
    )
    for method, shape, options in others:
        cases.append(Case(method, shape, "small", ("cpu",), **options))
    return cases


def _middle() -> list[Case]:
    cases = []
    for shape in ((512, 2048), (1024, 512)):
        for method in ("sp", "cka", *NONLINEAR):
            quick = shape == (1024, 512) and method in ("sp", "rkd_distance")
            suites = ("quick", "cpu") if quick else ("cpu",)
            cases.append(Case(method, shape, "middle", suites, seconds=2.5))
    return cases


def _large() -> list[Case]:
    """Batches whose matrices no longer fit a cache, up to those that do not fit a machine."""
    everyone = (EAGER, COMPILE, CHUNKED)
    big: dict[str, Any] = {"memory": True, "tuned": True, "seconds": 6.0}
    cases = [
        Case(method, shape, "large, non-linear", ("cpu",), everyone, **big)
        for shape in ((4096, 512), (8192, 256))
        for method in NONLINEAR
    ]
    huge: dict[str, Any] = {"regime": "huge", "memory": True, "seconds": 6.0}
    for method in NONLINEAR:
        cases.append(Case(method, (16384, 128), suites=("cpu",), against=(CHUNKED,), **huge))
        cases.append(Case(method, (65536, 64), suites=("large",), against=(CHUNKED, KEOPS), **huge))
    for method in LINEAR:
        regime, against = "large, linear", (*everyone, REFERENCE)
        cases.append(Case(method, (4096, 512), regime, ("cpu",), against, **big))
        suites = ("cpu", "factored")
        cases.append(Case(method, (8192, 256), regime, suites, against, **big))
    cases.append(Case("pkt", (2048, 128), "middle", ("quick",), everyone, memory=True, seconds=3.0))
    return cases


def _maps_and_tokens() -> list[Case]:
    cases = [
        Case(method, shape, "maps", ("cpu",), channels_last=channels_last)
        for shape in ((64, 64, 8, 8), (64, 512, 7, 7))
        for channels_last in (False, True)
        for method in ("sp", "cka", "pkt")
    ]
    both: dict[str, Any] = {"suites": ("cpu",), "memory": True, "seconds": 6.0}
    cases += [
        Case("gram_anchor", (64, 196, 384), "tokens and banks", **both),
        Case("minilm_v2", (24, 12, 128, 64), "tokens and banks", masked=True, **both),
        Case(
            "compress",
            (256, 128),
            "tokens and banks",
            bank=65536,
            against=(EAGER, COMPILE, CHUNKED),
            **both,
        ),
    ]
    return cases


def _factored() -> list[Case]:
    """More of the batches for which no pair is ever formed."""
    against = (EAGER, CHUNKED, REFERENCE)
    cases = [
        Case("sp", shape, "large, linear", ("factored",), against, memory=True, seconds=6.0)
        for shape in ((4096, 256), (8192, 128))
    ]
    return [*cases, Case("sp", (262144, 128), "huge", ("factored",), (), memory=True)]


def _gpu() -> list[Case]:
    """What a GPU is measured on: first the cases with figures to reach.

    Compiling a baseline takes longer than measuring it, so each is compiled for a few cases.
    """
    tuned, blocks = (EAGER, COMPILE, MAX_AUTOTUNE), (CHUNKED, LIGER)
    common: dict[str, Any] = {"suites": ("gpu",), "seconds": 1.0}
    small = common | {"regime": "small", "precision": "high"}
    large = common | {"regime": "large", "precision": "high"}
    cases = [
        Case("pkt", (256, 512), against=(*tuned, *blocks), **small),
        Case("rkd_distance", (256, 512), against=tuned, **small),
        Case("sp", (256, 512), **small),
        Case("rbf_frobenius", (256, 512), **small),
        Case("pkt", (4096, 512), against=(*tuned, *blocks), **large),
        Case("rkd_distance", (4096, 512), against=(EAGER, COMPILE, CHUNKED), **large),
        Case("rbf_frobenius", (4096, 512), against=(EAGER, COMPILE, CHUNKED), **large),
    ]
    half = common | {"dtype": "bfloat16"}
    for method in NONLINEAR:
        against = (EAGER, *blocks) if method == "pkt" else (EAGER, CHUNKED)
        cases.append(Case(method, (32768, 512), "huge", against=against, **half))
    # its products over rows follow the precision whatever the features are
    for dtype in ("bfloat16", "float32"):
        options = common | {"dtype": dtype, "precision": "high"}
        cases.append(Case("sp", (1 << 20, 512), "factored", against=(EAGER,), **options))
    for batch in (64, 128, 512, 1024):
        cases.append(Case("pkt", (batch, 512), **small))
        cases.append(Case("rkd_distance", (batch, 512), against=(EAGER,), **small))
    others: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
        ("cka", (256, 512), {}),
        ("irg_edge", (256, 512), {}),
        ("cc", (256, 512), {}),
        ("rkd_angle", (256, 512), {}),
        ("clip_affinity", (1024, 512), {"bank": 1024}),
        ("compress", (256, 128), {"bank": 65536}),
        ("minilm_v2", (24, 12, 128, 64), {"masked": True}),
        ("gram_anchor", (64, 196, 384), {}),
    )
    for method, shape, options in others:
        cases.append(Case(method, shape, against=(EAGER,), **small, **options))
    return cases


CASES: tuple[Case, ...] = (
    *_small(),
    *_middle(),
    *_maps_and_tokens(),
    *_large(),
    *_factored(),
    *_gpu(),
)


def select(suite: str, only: str | None = None) -> list[Case]:
    """The cases of a suite, those alone whose name matches the pattern ``only``, if given.

    A pattern without a wildcard matches anywhere in the name.

    Raises:
        ValueError: an unknown suite, or a pattern that matches nothing in it.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(map(repr, SUITES))}, got {suite!r}")
    cases = [case for case in CASES if suite in case.suites]
    if only is None:
        return cases
    pattern = only if any(c in only for c in "*?[") else f"*{only}*"
    matching = [case for case in cases if fnmatch.fnmatch(case.name, pattern)]
    if not matching:
        names = ", ".join(case.name for case in cases)
        raise ValueError(f"only: {only!r} matches no case of suite {suite!r}; it has {names}")
    return matching
