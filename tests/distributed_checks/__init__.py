"""What holds on several ranks: the loss and gradients of one process. Run by `ranks.py`."""

from __future__ import annotations

EXACT = 1e-12  # relative, float64
SINGLE = 2e-5  # relative, float32: sums of some hundred terms in another order

# the modules that hold checks
MODULES = tuple(f"{__name__}.{name}" for name in ("triples", "presets", "arguments", "training"))
