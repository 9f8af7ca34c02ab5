"""The Triton kernels compiled ahead of time: they fit every supported GPU, though none is here."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import resources
from benchmarks.resources import SHARED_LIMIT, Resources

pytest.importorskip("triton")

each_capability = pytest.mark.parametrize("capability", SHARED_LIMIT)


def compile_kernels(*options: str) -> list[Resources]:
    """What the command finds, in a process whose kernels are compiled and not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.resources", "--json", *options],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.stdout, run.stderr
    return [Resources(**entry) for entry in json.loads(run.stdout)]


def check(found: list[Resources], capability: int) -> None:
    assert {one.capability for one in found} == {capability}
    assert {"prepare", "product"} <= {one.kernel for one in found}
    # what has products has tiles, and a tile that fits nowhere would have been no configuration
    assert any(one.shared for one in found)
    assert [one for one in found if not one.fits] == []


@each_capability
def test_no_configuration_spills(capability: int, tally: object) -> None:
    found = compile_kernels("--some", "--capability", str(capability))
    check(found, capability)
    tally(f"Triton kernels compiled for sm_{capability}", len(found))  # type: ignore[operator]


@pytest.mark.all_triples
@each_capability
def test_no_configuration_of_any_loss_spills(capability: int) -> None:
    check(compile_kernels("--capability", str(capability)), capability)


def test_what_does_not_fit_is_told() -> None:
    fits = Resources("values", 120, "pkt", "float32", "tf32x3", "dense", "64x32x32", 8, 255, 0, 0)
    assert fits.fits
    assert not dataclasses.replace(fits, spilled=8).fits
    assert not dataclasses.replace(fits, shared=SHARED_LIMIT[120] + 1).fits
    assert dataclasses.replace(fits, capability=90, shared=SHARED_LIMIT[120] + 1).fits
    table = resources.summary([fits, dataclasses.replace(fits, spilled=8, method="sp")])
    assert "| values | float32 | tf32x3 | 64x32x32 w8: 255 r, 8 spilled, 0 KB |" in table


def test_the_losses_compiled_use_every_kind_of_stage() -> None:
    """What the presets have, and the pair functions, statistics and losses that take most."""
    from affkd_kernels.kernels import choices

    methods = {one.method for one in resources.all_compilations()} - {resources.ANGLE}
    specs = [resources.spec_of(method) for method in methods]
    assert {choices.pair_function(s.affinity) for s in specs} == {
        *("linear", "squared_distance", "distance", "gaussian", "power"),
    }
    assert {choices.normalization_kind(s.normalization) for s in specs} == {
        *("row_l2", "row_l1", "row_sum", "softmax", "frobenius", "frobenius_centered"),
        *("mean_positive", "max"),
    }
    assert {choices.loss_kind(s.loss) for s in specs} == {
        *("mse", "l1", "smooth_l1", "kl_forward", "kl_symmetric"),
    }
