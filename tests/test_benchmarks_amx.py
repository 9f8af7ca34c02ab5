"""The trial of the tile units: its products are those of float32."""

from __future__ import annotations

import pytest

from benchmarks import amx


def test_products_on_tile_units_are_as_exact_as_those_of_float32() -> None:
    try:
        trials = amx.measure()
    except amx.NoTileUnits as error:
        pytest.skip(str(error))
    assert [trial.products for trial in trials] == [1, 3, 6]
    for trial in trials:
        assert trial.tile_error <= 1e-6 and trial.vector_error <= 1e-6
        assert trial.tile_seconds > 0 and trial.vector_seconds > 0
        assert trial.left in amx.summary(trials)


def test_says_why_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(amx.NoTileUnits, match="no-such-compiler was not found"):
        amx.measure()
