"""The CUDA kernels, executed on a CPU (tests/cuda_host), against the reference in float64."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from case_inputs import Inputs, bank, mask, own_keys, pair, seed_of, weights
from cases import AFFINITIES, Call, Part, Triple, covering, valid_triples
from cuda_host import harness
from cuda_host.comparison import (
    SAMPLE,
    compare,
    compare_with_eager,
    distance,
    noise,
    with_kernels,
    with_reference,
)
from edges import EDGES, LAYOUTS, Edge

import affkd_kernels as affkd
from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels import angle
from affkd_kernels.spec import make_spec

pytestmark = pytest.mark.skipif(
    harness.why_unusable() is not None, reason=str(harness.why_unusable())
)


each_affinity = pytest.mark.parametrize("part", AFFINITIES, ids=str)


def of_affinity(part: Part, calls_each: int) -> list[tuple[Triple, Call]]:
    return [(t, c) for t, c in covering(valid_triples(), calls_each) if t.affinity == part]


@each_affinity
def test_every_triple_in_float64(
    part: Part, kernels: harness.Library, tally: Callable[..., None]
) -> None:
    for triple, one in of_affinity(part, 1):
        compare(kernels, one.make(seed_of(triple, one)), triple, 1e-11)
        tally("CUDA kernel calls compared in float64")


@each_affinity
@pytest.mark.parametrize(
    "dtype, precision",
    [(torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.bfloat16, "ieee"),
     (torch.float16, "tf32x3")],
    ids=["float32-ieee", "float32-tf32x3", "bfloat16-ieee", "float16-tf32x3"],
)  # fmt: skip
def test_every_triple_in_float32(
    part: Part,
    dtype: torch.dtype,
    precision: str,
    kernels: harness.Library,
    tally: Callable[..., None],
) -> None:
    every = 1 if dtype == torch.float32 else 2
    for triple, one in of_affinity(part, 1)[seed_of(dtype) % every :: every]:
        inputs = one.make(seed_of(triple, one)).to(dtype)
        compare_with_eager(kernels, inputs, triple, precision=precision)
        tally(f"CUDA kernel calls compared in {str(dtype).removeprefix('torch.')}")


SHAPES = [
    Call("B5-D1", lambda s: pair(s, 5, 1)),
    Call("B1-D3", lambda s: pair(s, 1, 3)),
    Call("B37-D19", lambda s: pair(s, 37, 19, teacher_dim=3)),
    Call("B33-D64", lambda s: pair(s, 33, 64, teacher_dim=68)),
    Call("B70-D70", lambda s: pair(s, 70, 70, teacher_dim=5)),
    Call("B37-mask", lambda s: pair(s, 37, 4, teacher_dim=8, mask=mask(s, 37))),
    Call("Q37-K70", lambda s: bank(s, 37, 19, keys=70, teacher_dim=3, mask=mask(s, 37))),
    Call("Q70-K3", lambda s: bank(s, 70, 3, keys=3, teacher_dim=1)),
    Call("Q37-K70-own", lambda s: own_keys(bank(s, 37, 5, keys=70, teacher_dim=3), 29)),
    Call("N3-L37", lambda s: pair(s, 3, 37, 5, teacher_dim=3, items="tokens")),
    Call("N2-weights", lambda s: pair(s, 37, 5, row_weight=weights(s, 37), reduction="none")),
]


@pytest.mark.parametrize("budget", [2**62, 1], ids=["held", "panels"])
@pytest.mark.parametrize("one", SHAPES, ids=str)
def test_shapes_in_one_piece_and_in_panels(
    one: Call, budget: int, kernels: harness.Library
) -> None:
    for triple in SAMPLE:
        if one.allows(triple):
            compare(kernels, one.make(seed_of(triple, one)), triple, 1e-11, budget=budget)


@pytest.mark.parametrize("one", SHAPES, ids=str)
def test_shapes_on_tensor_cores(one: Call, kernels: harness.Library) -> None:
    for triple in SAMPLE[seed_of(one) % 2 :: 2]:
        inputs = one.make(seed_of(triple, one)).to(torch.float32)
        # a direction in one dimension has no gradient, and what is left of it is noise
        if not one.allows(triple) or inputs.student.shape[-1] == 1:
            continue
        compare_with_eager(kernels, inputs, triple, precision="tf32x3")
        value, gradients = with_kernels(kernels, inputs, triple, precision="tf32")
        exact, exact_gradients = with_reference(inputs.to(torch.float64), triple)
        rounding = noise(inputs, triple, 2.0**-11)
        pairs = zip((value, *gradients), (exact, *exact_gradients), rounding, strict=True)
        for x, y, unavoidable in pairs:
            assert distance(x, y) <= 8 * unavoidable + 2e-3, str(triple)


@pytest.mark.parametrize("one", EDGES, ids=str)
def test_edges(one: Edge, kernels: harness.Library) -> None:
    """Finite where the reference is, non-finite where it is, zero where it is exactly zero."""
    for triple in SAMPLE:
        inputs = one.make(seed_of(triple, one))
        keys = inputs.options.get("student_keys", inputs.student)
        # without any pair nothing is launched
        if not one.allows(triple) or 0 in inputs.student.shape or 0 in keys.shape:
            continue
        value, gradients = with_kernels(kernels, inputs, triple)
        expected, expected_gradients = with_reference(inputs, triple)
        assert bool(value.isfinite().all()) == bool(expected.isfinite().all()), str(triple)
        if not expected.isfinite().all():
            continue
        exact = expected.dtype == torch.float64
        assert distance(value, expected) < (1e-9 if exact else 1e-4), str(triple)
        for x, y in zip(gradients, expected_gradients, strict=True):
            if one.outcome == "zero":
                assert not x.any() and not value.any(), str(triple)
            if one.outcome == "masked":
                assert not x[(y == 0).all(-1)].any(), str(triple)
            if exact:
                assert distance(x, y) < (1e-4 if one.name == "common-offset" else 1e-6), str(triple)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, kernels: harness.Library) -> None:
    triple = SAMPLE[0]
    inputs = pair(7, 6, 5, teacher_dim=4)
    strided = inputs.map(LAYOUTS[layout])
    value, gradients = with_kernels(kernels, strided, triple)
    expected, expected_gradients = with_reference(inputs, triple)
    assert distance(value, expected) < 1e-12
    assert distance(gradients[0], expected_gradients[0]) < 1e-12


def test_features_of_different_dtypes(kernels: harness.Library) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for student in dtypes:
        for teacher in dtypes:
            inputs = pair(7, 9, 16, teacher_dim=8)
            mixed = Inputs(inputs.student.to(student), inputs.teacher.to(teacher))
            value, gradients = with_kernels(kernels, mixed, SAMPLE[0])
            expected, expected_gradients = with_reference(mixed.to(torch.float64), SAMPLE[0])
            assert value.dtype == torch.promote_types(
                torch.promote_types(student, teacher), torch.float32
            )
            assert distance(value, expected) < 2e-6
            assert distance(gradients[0], expected_gradients[0]) < 2e-6


def test_two_calls_agree_bitwise(kernels: harness.Library) -> None:
    for triple in SAMPLE:
        inputs = pair(11, 70, 24).to(torch.float32)
        first, second = (
            with_kernels(kernels, inputs, triple, precision="tf32x3") for _ in range(2)
        )
        assert torch.equal(first[0], second[0]) and torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("near_copy", [False, True], ids=["random", "near-copy"])
def test_float32_error_is_the_reference_s_own(near_copy: bool, kernels: harness.Library) -> None:
    """At most twice the eager float32 error (plus 1e-6), in the mean square over a few inputs."""
    for triple in SAMPLE:
        own, eager_own = torch.zeros(2), torch.zeros(2)
        for seed in range(13, 21):
            inputs = pair(seed, 96, 40)
            if near_copy:
                inputs = Inputs(inputs.student, inputs.student + 0.01 * inputs.teacher)
            inputs = inputs.to(torch.float32)
            exact, (exact_gradient,) = with_reference(inputs.to(torch.float64), triple)
            value, (gradient,) = with_kernels(kernels, inputs, triple)
            eager, (eager_gradient,) = with_reference(inputs, triple)
            own += torch.tensor([distance(value, exact), distance(gradient, exact_gradient)]) ** 2
            eager_own += (
                torch.tensor([distance(eager, exact), distance(eager_gradient, exact_gradient)])
                ** 2
            )
        assert ((own / 8).sqrt() <= 2 * (eager_own / 8).sqrt() + 1e-6).all(), str(triple)


# the launches of loss and student gradient, one call of a batch that the workspace holds
LAUNCHES = {"cka": ["gram", "means", "product"]}


@pytest.mark.parametrize("name", affkd.list_presets())
def test_a_preset_takes_three_launches(name: str, kernels: harness.Library) -> None:
    loss = affkd.preset(name)
    spec = getattr(loss, "spec", None)
    if spec is None or name in ("rkd_angle", "seed", "compress", "clip_affinity"):
        pytest.skip("not one self-affinity")
    tokens = spec.items != "samples"
    student = torch.randn(2, 6, 4) if tokens else torch.randn(9, 4)
    items = "tokens" if tokens else "samples"
    inputs, _ = canonical_inputs(
        make_spec(spec.affinity, spec.normalization, spec.loss, items=items), student, student
    )
    result = kernels.loss_and_grad(spec, inputs)
    assert result.loss.isfinite()
    assert kernels.launches == LAUNCHES.get(name, ["gram", "rows", "product"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [1.0, 0.05, 0.0])
def test_angle(beta: float, dtype: torch.dtype, kernels: harness.Library) -> None:
    student, teacher = torch.randn(2, 19, 4), torch.randn(2, 19, 3)
    student[0, 3] = student[0, 5]
    valid = torch.rand(2, 19) < 0.8
    sides = [angle.distances(x.to(dtype), valid, dtype) for x in (student, teacher)]
    expected, expected_slope = angle.eager_sweep(*sides, beta, True)
    arguments = [x for side in sides for x in (side.squared, side.inverse)]
    value, slope = kernels.angle(arguments, beta)
    tolerance = 1e-11 if dtype == torch.float64 else 3e-6
    assert distance(value, expected) < tolerance
    # only the sum with the transpose means anything, and the diagonal nothing
    off_diagonal = 1 - torch.eye(19)
    symmetric, expected_symmetric = ((x + x.mT) * off_diagonal for x in (slope, expected_slope))
    assert distance(symmetric, expected_symmetric) < 10 * tolerance


class TestSanitizers:
    """The kernels with a sanitizer watching, and with faults, each of which is to be noticed."""

    @pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
    def test_silent_on_the_kernels(self, sanitizer: str) -> None:
        every = os.environ.get("AFFKD_CUDA_HOST_EVERY", "251")
        result = harness.stress(sanitizer, "every", every)
        assert result.returncode == 0, result.stderr[:3000]

    @pytest.mark.parametrize(
        "fault, file, sanitizer, message",
        [
            ("missing_barrier", "row_losses.cuh", "", None),
            ("missing_wait", "", "", None),
            ("divergent_barrier", "tile_items.cuh", "", "divergent"),
            ("short_memory", "", "address,undefined", "AddressSanitizer"),
            ("missing_barrier", "tile_items.cuh", "thread", "data race"),
            ("missing_boundary", "", "thread", "data race"),
        ],
    )
    def test_notice(self, fault: str, file: str, sanitizer: str, message: str | None) -> None:
        """A fault, at the first barrier of a file that the call meets: all others are those of
        test_cuda_barriers."""
        met = (site for site in harness.barriers() if "0" in harness.met()[site])
        barrier = next(site for site in met if site.startswith(file))
        result = harness.stress(sanitizer, fault, barrier)
        # 3: the numbers are not those of the right program
        assert result.returncode == 3 if message is None else message in result.stderr
        assert result.returncode != 0
