"""Every barrier of the CUDA bodies is needed, and the harness notices each that is missing."""

from __future__ import annotations

import hashlib
import os

import pytest
from cuda_host import harness

pytestmark = pytest.mark.skipif(
    harness.why_unusable() is not None, reason=str(harness.why_unusable())
)
BARRIERS = harness.barriers()
# of the barriers a normal run leaves out one of so many, others for every state of the sources
PARTS = 1 if "AFFKD_CUDA_HOST_EVERY" in os.environ else 12


def shared_out() -> list[str]:
    sources = b"".join(path.read_bytes() for path in sorted(harness.CSRC.glob("cuda/*.cuh")))
    return BARRIERS[hashlib.sha256(sources).digest()[0] % PARTS :: PARTS]


def test_every_barrier_is_met_by_some_case() -> None:
    assert sorted(harness.met()) == sorted(BARRIERS)


def notice(*requests: str) -> dict[str, str]:
    """How each missing barrier was noticed: the status that a process ended with, or "0"."""
    result = harness.stress("thread", "missing", *requests)
    told = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert len(told) == len(requests), result.stderr[:3000]
    return {site: status for site, _, status in told}


def test_what_is_not_missing_is_not_noticed() -> None:
    assert notice("nowhere.cuh:1/0") == {"nowhere.cuh:1": "0"}


def test_every_missing_barrier_is_noticed() -> None:
    """As a race, as other numbers, or as threads that wait for others in vain."""
    told = notice(*(f"{site}/{','.join(harness.met()[site])}" for site in shared_out()))
    assert not [site for site, status in told.items() if status in ("0", "whole")]
