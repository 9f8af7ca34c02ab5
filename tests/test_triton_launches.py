"""How many launches a call of the Triton kernels takes, and that Triton's launcher takes them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import valid_triples

from affkd_kernels.inputs import Inputs, canonical_inputs
from affkd_kernels.kernels.result import Needs
from affkd_kernels.presets import preset
from affkd_kernels.spec import LossSpec, make_spec

pytest.importorskip("triton")

from affkd_kernels.kernels.triton import arguments, call, launch, plan  # noqa: E402

THREE = ["gram", "rows", "multiply"]
# equal pairs have to tie for a maximum, whose items are prepared once for all tiles
PREPARED = ["prepare", *THREE]
# and a common point of all items takes a sum before
MOVED = ["sum", *PREPARED]
# which with most losses the gradient has to lose as well
CENTERED = [*MOVED, "sum", "center"]


class NotCompiled:
    """Stands for a compiled kernel, whose launches are written down."""

    launched: list[arguments.Launch] = []
    metadata = types.SimpleNamespace(target=types.SimpleNamespace(backend="none"))

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launched.append(arguments.Launch(self, grid, args))


class Named(call.Call):
    """A call whose launches are not done, but named."""

    def __init__(self, *args: Any) -> None:
        self.names: list[str] = []
        super().__init__(*args)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **choices: Any) -> None:
        self.names.append(kernel.fn.__name__.removesuffix("_kernel"))
        self.launched.append(arguments.Launch(NotCompiled(self.names[-1]), grid, args))


def plan_of(
    spec: LossSpec, needs: Needs, shape: tuple[int, ...], keys: int
) -> tuple[plan.Plan, Inputs]:
    """On a GPU, for features of a shape and, where there are some, so many keys."""
    student = torch.empty(shape, device="meta")
    bank = student.new_empty(shape[0], keys, shape[2]) if keys else None
    inputs, _ = canonical_inputs(spec, student, student, bank, bank)
    form = plan.Form.of(spec, inputs, needs, "dense", 1.0)._replace(capability=90)
    return plan.Plan(form), inputs


def launches_of(spec: LossSpec, needs: Needs, *shape: int, keys: int = 0) -> list[str]:
    named = Named(*plan_of(spec, needs, shape, keys))
    launch.compute(named, needs)
    return named.names


@pytest.mark.parametrize(
    "name, expected",
    [
        *((name, THREE) for name in ("sp", "pkt", "rkd_distance", "cc", "rbf_frobenius")),
        *((name, THREE) for name in ("sp_frobenius", "gram_anchor", "ickd", "minilm_v2")),
        ("irg_edge", MOVED),
        ("cka", MOVED),
    ],
)
def test_the_everyday_batch(name: str, expected: list[str]) -> None:
    spec = preset(name, items="tokens").spec
    assert launches_of(spec, Needs(), 1, 256, 512) == expected
    assert launches_of(spec, Needs(), 8, 64, 512) == expected


@pytest.mark.parametrize("name", ["seed", "compress"])
def test_a_bank_of_keys(name: str) -> None:
    spec = preset(name, items="tokens").spec
    assert launches_of(spec, Needs(), 1, 256, 512, keys=65536) == THREE
    both = Needs(student=True, student_keys=True)
    assert launches_of(spec, both, 1, 256, 512, keys=512) == [*THREE, "multiply"]


def test_every_triple_but_the_centered_ones() -> None:
    seen = set()
    for triple in valid_triples():
        spec = make_spec(*triple.build(), items="tokens")
        found = launches_of(spec, Needs(), 1, 256, 512)
        how = plan_of(spec, Needs(), (1, 256, 512), 0)[0].how
        if how.centered:
            # the means of A, and with most losses those of its gradient, need sweeps of their own
            assert len(found) > 8 and "rows" not in found
            continue
        expected = THREE
        if how.largest or how.centered_features:
            expected = MOVED if how.copied else PREPARED
        if how.centered_product:
            expected = CENTERED
        assert found == expected, triple
        seen.add(len(found))
    assert seen == {3, 4, 5, 7}


def test_what_needs_no_product() -> None:
    spec = make_spec("gram", "row_l2", "mse", items="tokens")
    nothing = Needs(student=False)
    assert launches_of(spec, nothing, 1, 256, 512) == ["gram", "rows", "finish_stash"]
    scale = Needs(student=False, student_scale=True)
    assert launches_of(spec, scale, 1, 256, 512) == ["gram", "rows", "finish_stash"]


@pytest.mark.parametrize("shape", [(1, 4096, 512), (1 << 16, 33, 8)])
def test_a_larger_batch_has_kernels_that_share_its_rows(shape: tuple[int, ...]) -> None:
    spec = make_spec("gram", "row_l2", "mse", items="tokens")
    found = launches_of(spec, Needs(), *shape)
    assert found[0] == "prepare" and found[-1] == "product" and "rows" not in found


def assert_alike(argument: Any, first: Any, moved: dict[int, int]) -> None:
    """Numbers are the same; `moved` says where every address of the first call has gone."""
    if isinstance(first, tuple):
        for both in zip(argument, first, strict=True):
            assert_alike(*both, moved)
    elif isinstance(first, torch.Tensor):
        assert argument == (moved.setdefault(first.data_ptr(), argument) if first.numel() else 0)
    else:
        assert argument is first


@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
def test_a_call_can_be_launched_again(algorithm: str) -> None:
    """With its own tensors in the places of inputs and results, a replay has the same arguments."""
    keys, student = torch.randn(1, 6, 4), torch.randn(1, 9, 4)
    for triple in valid_triples()[algorithm == "tiled" :: 4]:
        spec = make_spec(*triple.build(), items="tokens")
        for bank in (None, keys):
            inputs, _ = canonical_inputs(spec, student, student, bank, bank)
            needs = Needs(student_keys=bank is not None, student_scale=spec.affinity.name == "gram")
            named = Named(plan.Plan(plan.Form.of(spec, inputs, needs, algorithm, 1.0)), inputs)
            first = launch.compute(named, needs)
            named.finished(*first)
            assert named.plan.replay is not None and named.plan.replay.copied_to is None
            NotCompiled.launched.clear()
            again = named.plan.replay(inputs)
            launched = NotCompiled.launched
            assert [one[:2] for one in launched] == [one[:2] for one in named.launched]
            moved = {x.data_ptr(): x.data_ptr() for x in inputs if x is not None}
            for one, other in zip(launched, named.launched, strict=True):
                assert_alike(one.arguments, other.arguments, moved)
            # nothing of the first call is left, and no two of its tensors have met
            kept = {x.data_ptr() for x in named.allocated if x.numel()}
            assert len(set(moved.values())) == len(moved) and not kept & set(moved.values())
            for x, y in zip(again, first, strict=True):
                assert (x is None) == (y is None)
                assert x is None or y is None or (x.shape, x.dtype) == (y.shape, y.dtype)


def run_compiled(*command: str) -> str:
    """What a command prints, in a process whose kernels are compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.stdout and "Traceback" not in run.stderr, run.stderr
    return run.stdout


needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


@needs_compiler
def test_the_driver_is_given_what_triton_gives_it(tally: Any) -> None:
    launches = run_compiled("tests/driver_launches.py")
    assert int(launches) == 12
    tally("launches compared with Triton's, over a stand-in for the driver", 12)


@needs_compiler
def test_what_a_call_costs_the_host_is_told() -> None:
    lines = run_compiled("-m", "benchmarks.launcher", "--rounds", "100", "pkt").splitlines()
    (row,) = [line for line in lines if line.startswith("| pkt")]
    assert row.split("|")[2].strip() == "3"
