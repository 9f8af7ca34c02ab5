"""Batches of any size: a GPU takes every grid, and no address is cut to 32 bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from triton_calls import tl, triton

from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels.result import Needs
from affkd_kernels.kernels.triton import call, launch, plan, tiles
from affkd_kernels.spec import make_spec


class Grids(call.Call):
    """A call whose launches are not done."""

    grids: list[tuple[int, ...]] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **choices: Any) -> None:
        Grids.grids.append(grid)


LARGE = [
    # matrices, queries, keys (0: a self-affinity), length
    pytest.param(1 << 18, 33, 0, 8, id="many-matrices"),
    pytest.param(1, 4, 1 << 23, 8, id="many-keys"),
    pytest.param(1, 4, 3, 1 << 24, id="long-features"),
]


@pytest.mark.parametrize("matrices, queries, keys, length", LARGE)
@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
@pytest.mark.parametrize("triple", [("rbf(unit=False)", "none", "mse"), ("gram", "max", "l1")])
def test_a_gpu_takes_every_grid(
    matrices: int, queries: int, keys: int, length: int, algorithm: str, triple: Any
) -> None:
    features = torch.empty(matrices, queries, length, device="meta")
    bank = features.new_empty(matrices, keys, length) if keys else None
    spec = make_spec(*triple, items="tokens")
    inputs, _ = canonical_inputs(spec, features, features, bank, bank)
    needs = Needs(student=True, student_keys=bool(keys))
    form = plan.Form.of(spec, inputs, needs, algorithm, 1.0)
    Grids.grids = []
    launch.compute(Grids(plan.Plan(form), inputs), needs)
    assert len(Grids.grids) > 2
    for grid in Grids.grids:
        assert grid[0] < 1 << 31 and all(count < 1 << 16 for count in grid[1:])


class Masks(NamedTuple):
    query_mask: Any
    key_mask: Any


@triton.jit
def _places_kernel(masks: Any, out: Any, row: Any, column: Any, queries: Any, keys: Any,
                   HOW: tl.constexpr, SHAPE: tl.constexpr):  # fmt: skip
    tile = tiles.tile_of(masks, row * 0, row, column, queries, queries, keys, 0, HOW, SHAPE)
    at = out + tile.inner_rows[:, None] * SHAPE.columns + tile.inner_columns[None, :]
    tl.store(at, tiles.first_pair(tile) + tiles.pair_offsets(tile))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
@pytest.mark.parametrize("keys, length", [(1 << 27, 8), (48, 1 << 27)])
def test_addresses_inside_a_tile_of_any_batch(
    keys: int, length: int, algorithm: str, capability: int
) -> None:
    """Rows of a tile that lie 2^31 pairs, or features, apart."""
    queries = torch.empty(1, 64, length, device="meta")
    bank = queries.new_empty(1, keys, length)
    spec = make_spec("gram", "softmax", "kl", items="tokens")
    inputs, _ = canonical_inputs(spec, queries, queries, bank, bank)
    form = plan.Form.of(spec, inputs, Needs(), algorithm, 1.0)
    made = plan.Plan(form._replace(capability=capability))
    assert made.tiles.shape.wide and made.gradient.shape.wide
    shape = made.tiles.shape
    step = max(keys, length)
    out = torch.empty(shape.rows, shape.columns, dtype=torch.int64)
    first = step - shape.columns
    _places_kernel[(1,)](Masks(out, out), out, 0, first, 64, step, HOW=made.how, SHAPE=shape)
    expected = torch.arange(shape.rows)[:, None] * step + first + torch.arange(shape.columns)
    assert torch.equal(out, expected)
