"""The registry under pytest-benchmark: ``python -m pytest benchmarks/test_speed.py``.

For work on one kernel (``-k rkd_distance-1024``, ``--benchmark-compare``). Figures to report come
from ``python -m benchmarks.run``, which controls for order and noise.
"""

from __future__ import annotations

from typing import Any

import pytest

from .inputs import make_inputs
from .providers import AUTO_AGAIN, Unavailable, make_provider, provider_names
from .registry import COMPILE, Case, select

PAIRS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in select("quick")
    for name in provider_names(case)
    if name not in (AUTO_AGAIN, COMPILE)
]


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_forward_and_backward(benchmark: Any, case: Case, name: str) -> None:
    inputs = make_inputs(case)
    try:
        provider = make_provider(name, case)
        provider.step(inputs)
    except (Unavailable, RuntimeError) as error:
        pytest.skip(str(error))
    benchmark.group = case.name
    benchmark(provider.step, inputs)
