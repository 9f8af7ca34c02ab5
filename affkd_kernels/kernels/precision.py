"""How exact float32 products on a GPU have to be, as torch was told for its own matrix products."""

from __future__ import annotations

from typing import Literal

import torch

# ieee: no tensor cores; tf32: one product of operands rounded to 10 bits of mantissa; tf32x3: three
# such products, whose sum is as exact as float32
Precision = Literal["ieee", "tf32x3", "tf32"]


def float32_precision() -> Precision:
    """The precision of float32 products on CUDA devices, read anew at each call.

    ``torch.set_float32_matmul_precision`` maps "highest" to "ieee", "high" to "tf32x3" and "medium"
    to "tf32". ``torch.backends.cuda.matmul.fp32_precision``, which has no word for three products,
    maps "tf32" to "tf32" and everything else to "ieee", and wins where the two disagree: so it is
    for torch's own products.
    """
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    try:
        # "high" only through this function: it sets the newer setting to "tf32" too
        return "tf32x3" if torch.get_float32_matmul_precision() == "high" else "tf32"
    except RuntimeError:
        # where the newer setting alone was changed, torch refuses to tell the older one
        return "tf32"
