"""The baselines compute the presets: a comparison with anything else would be worth nothing."""

from __future__ import annotations

import pytest
import torch

from affkd_kernels.presets import list_presets, preset
from benchmarks import chunked, keops
from benchmarks.accuracy import error_of
from benchmarks.inputs import make_inputs
from benchmarks.providers import Provider, Unavailable, make_provider, provider_names
from benchmarks.registry import CHUNKED, EAGER, KEOPS, METHODS, Case

# per method: a shape of the student and of the teacher, and what the call needs besides
SPECIAL = {
    "gram_anchor": ((3, 7, 5), {}),
    "nst": ((3, 4, 3, 2), {}),
    "ickd": ((3, 4, 3, 2), {}),
    "seed": ((6, 5), {"bank": 15}),
    "compress": ((6, 5), {"bank": 15}),
    "minilm_v2": ((4, 2, 8, 5), {"masked": True}),
    "clip_affinity": ((6, 5), {"bank": 6}),
}
# PKT's public code adds 1e-7 to the norms
TOLERANCES = {"pkt": 1e-6}


def small_case(method: str) -> Case:
    shape, options = SPECIAL.get(method, ((23, 6), {}))
    return Case(method, shape, "test", (), against=(EAGER, CHUNKED, KEOPS), **options)


def assert_computes_preset(case: Case, provider: Provider) -> None:
    inputs = make_inputs(case).to(torch.float64)
    if case.bank:
        # a bank's rows are of unit length to float32's precision, which is not enough here
        for side in ("student_keys", "teacher_keys"):
            keys = inputs.options[side]
            unit = torch.nn.functional.normalize(keys.detach())
            inputs.options[side] = unit.requires_grad_(keys.requires_grad)
    truth = Provider("preset", preset(case.method, backend="reference")).step(inputs)
    error = error_of(provider.step(inputs), truth)
    tolerance = TOLERANCES.get(case.method, 1e-11)
    assert error.loss <= tolerance
    assert error.gradient <= tolerance


def test_every_preset_has_a_baseline() -> None:
    assert set(METHODS) == set(list_presets())


@pytest.mark.parametrize("method", METHODS)
def test_eager_forms(method: str) -> None:
    case = small_case(method)
    names = [name for name in provider_names(case) if name.startswith(EAGER)]
    assert EAGER in names
    for name in names:
        assert_computes_preset(case, make_provider(name, case))


@pytest.mark.parametrize("method", chunked.RECIPES)
@pytest.mark.parametrize("rows_per_block", [1, 5, 100])
def test_chunked_forms(method: str, rows_per_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case(method)
    if method == "gram_anchor":
        # one matrix, as the large batches have it
        case = Case(method, (23, 6), "test", (), against=(CHUNKED,))
    keys = case.extent[2]
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", rows_per_block * keys)
    assert_computes_preset(case, make_provider(CHUNKED, case))


@pytest.mark.slow
@pytest.mark.parametrize("method", keops.FORMULAS)
def test_keops_forms(method: str) -> None:
    case = small_case(method)
    try:
        provider = make_provider(KEOPS, case)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert_computes_preset(case, provider)


def test_the_mask_of_a_case_masks_something() -> None:
    mask = make_inputs(small_case("minilm_v2")).options["mask"]
    assert mask.any() and not mask.all()


def test_inputs_repeat_and_keep_their_layout() -> None:
    case = Case("sp", (4, 3, 5, 5), "test", (), channels_last=True)
    first, second = make_inputs(case), make_inputs(case)
    torch.testing.assert_close(first.student, second.student, rtol=0, atol=0)
    for maps in (first.student, first.teacher):
        assert maps.is_contiguous(memory_format=torch.channels_last)
    plain = make_inputs(Case("sp", (4, 3, 5, 5), "test", ()))
    torch.testing.assert_close(first.student, plain.student, rtol=0, atol=0)
