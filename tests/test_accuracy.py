"""The command that measures the error of every triple."""

from __future__ import annotations

from pathlib import Path

import accuracy
import pytest
from triples import base_triples


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert accuracy.main(list(options)) == 0
    return capsys.readouterr().out


def test_what_is_done_in_parts_is_printed_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "valid_triples", lambda: base_triples()[:40:8])
    whole = printed(capsys, "--only", "factored", "--every", "1")
    assert "| gram | factored |" in whole
    saved = tmp_path / "errors.jsonl"
    for start in ("1", "0"):
        printed(
            capsys, "--only", "factored", "--every", "2", "--start", start, "--save", str(saved)
        )
    assert printed(capsys, "--load", str(saved)) == whole
    monkeypatch.setattr(accuracy, "valid_triples", lambda: base_triples()[1:])
    with pytest.raises(ValueError, match="of other triples"):
        accuracy.main(["--load", str(saved)])
