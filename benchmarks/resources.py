"""Registers, spills and shared memory of the Triton kernels: ``python -m benchmarks.resources``.

Compiles ahead of time, for architectures that need not be here, what a call of each loss would
launch; ``cuobjdump``, which Triton brings along, reads the binaries. The exit status is 1 where a
kernel does not compile, spills registers or wants more shared memory than the card has.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels.result import Needs
from affkd_kernels.presets import preset
from affkd_kernels.spec import LossSpec, make_spec

from .report import insert
from .tables import table

# bytes of shared memory that a block may have, by compute capability
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
_FORMATS = (("float32", "ieee"), ("float32", "tf32x3"), ("bfloat16", "ieee"), ("float64", "ieee"))
_OTHER_FORMATS = (
    ("float32", "tf32"),
    ("float16", "ieee"),
    ("bfloat16 x float32", "ieee"),
    ("bfloat16 x float32", "tf32x3"),
    ("bfloat16 x float64", "ieee"),
)
ANGLE = "rkd_angle"
# a batch and a length whose pairs are held, and worked on in three launches
EVERYDAY = (256, 512)
# losses that together use every kind of stage
_SELF = ("pkt", "rkd_distance", "rbf_frobenius", "sp", "irg_edge", "cka")
_CROSS = ("compress", "clip_affinity")
# and those whose gradients take most
_WIDEST = (
    "rbf / row_sum / kl(direction='symmetric')",
    "polynomial(degree=3) / row_l1 / smooth_l1",
    "rbf / frobenius(center=True) / l1",
    "gram / frobenius(center=True) / l1",
)


@dataclass(frozen=True)
class Compilation:
    """A loss on features [items, length], whose kernels are compiled."""

    method: str  # a preset, or affinity / normalization / loss
    dtype: str  # of all features, or of the student's x the teacher's
    precision: str
    algorithm: str
    shape: tuple[int, int] = (4096, 512)
    keys: int = 0
    masked: bool = False  # items, and pairs


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on an architecture; sizes in bytes."""

    kernel: str
    capability: int
    method: str
    dtype: str
    precision: str
    algorithm: str
    tile: str
    warps: int
    registers: int
    spilled: int
    shared: int
    error: str = ""

    @property
    def fits(self) -> bool:
        within = self.spilled == 0 and self.shared <= SHARED_LIMIT[self.capability]
        return within and not self.error


def all_compilations() -> Iterator[Compilation]:
    """Every format and algorithm of losses that together use every kind of stage."""
    for algorithm in ("dense", "tiled"):
        for dtype, precision in _FORMATS:
            for method in _SELF:
                yield Compilation(method, dtype, precision, algorithm)
            for method in _CROSS:
                yield Compilation(method, dtype, precision, algorithm, (512, 128), 4096)
            # lengths and strides that no vector load divides
            yield Compilation("pkt", dtype, precision, algorithm, (4095, 511))
            yield Compilation("pkt", dtype, precision, algorithm, masked=True)
            yield Compilation("compress", dtype, precision, algorithm, (512, 128), 4096, True)
            if algorithm == "dense":
                for method in (*_SELF, *_CROSS):
                    keys = 1024 if method in _CROSS else 0
                    yield Compilation(method, dtype, precision, algorithm, EVERYDAY, keys)
                yield Compilation("pkt", dtype, precision, algorithm, (127, 511))
                yield Compilation("pkt", dtype, precision, algorithm, EVERYDAY, masked=True)
                for items in (512, 1024):
                    yield Compilation("pkt", dtype, precision, algorithm, (items, 512))
        for method in _WIDEST:
            yield Compilation(method, "float32", "tf32x3", algorithm)
            if algorithm == "dense":
                yield Compilation(method, "float32", "tf32x3", algorithm, EVERYDAY)
        for dtype, precision in _OTHER_FORMATS:
            for method in ("pkt", "cka"):
                yield Compilation(method, dtype, precision, algorithm)
                if algorithm == "dense":
                    yield Compilation(method, dtype, precision, algorithm, EVERYDAY)
    for dtype in ("float32", "float64"):
        yield Compilation(ANGLE, dtype, "ieee", "tiled")


def some_compilations() -> Iterator[Compilation]:
    """A loss of each kind, and each dtype and algorithm once."""
    yield Compilation("pkt", "float32", "tf32x3", "dense")
    yield Compilation("pkt", "float32", "tf32x3", "dense", EVERYDAY)
    yield Compilation("rkd_distance", "bfloat16", "ieee", "dense", EVERYDAY)
    yield Compilation("compress", "float32", "ieee", "dense", EVERYDAY, 1024)
    yield Compilation("rkd_distance", "bfloat16", "ieee", "tiled")
    yield Compilation("compress", "float32", "ieee", "tiled", (512, 128), 4096)
    yield Compilation("sp", "bfloat16 x float64", "ieee", "dense")
    yield Compilation("pkt", "float64", "ieee", "dense", EVERYDAY, masked=True)
    yield Compilation("pkt", "float64", "ieee", "tiled", masked=True)


def spec_of(method: str) -> LossSpec:
    """Of a preset, or of affinity / normalization / loss."""
    if " / " in method:
        return make_spec(*method.split(" / "))
    spec = preset(method).spec
    assert isinstance(spec, LossSpec)
    return spec


def kernels(compilation: Compilation, capability: int) -> Iterator[Any]:
    """What the call would launch; see affkd_kernels/kernels/triton/ahead.py."""
    from affkd_kernels.kernels.triton.ahead import angle_kernels, kernels_of

    dtypes = [getattr(torch, name) for name in compilation.dtype.split(" x ")]
    if compilation.method == ANGLE:
        return angle_kernels(dtypes[0], capability)
    spec = spec_of(compilation.method)
    items, length = compilation.shape
    sides = [torch.empty(1, items, length, dtype=x, device="meta") for x in (dtypes[0], dtypes[-1])]
    keys = [x.new_empty(1, compilation.keys, length) if compilation.keys else None for x in sides]
    spec = dataclasses.replace(spec, items="tokens")
    masks = {}
    if compilation.masked:
        counts = {"mask": (items,), "pair_mask": (items, compilation.keys or items)}
        if compilation.keys:
            counts["key_mask"] = (compilation.keys,)
        masks = {k: torch.empty(1, *n, dtype=torch.bool, device="meta") for k, n in counts.items()}
    inputs, _ = canonical_inputs(spec, *sides, *keys, **masks)
    needs = Needs(student=True, student_keys=compilation.method == "clip_affinity")
    how = (compilation.algorithm, capability, compilation.precision)
    return kernels_of(spec, inputs, needs, *how)


def compiled(shipped: Any) -> tuple[int, int, int]:
    """Registers, spilled bytes and shared bytes of a kernel, with what it is launched with."""
    from affkd_kernels.kernels.triton.configs import other_options

    first = _compiled(shipped, shipped.options)
    if first[1] and shipped.retried:
        for options in other_options(shipped.options):
            figures = _compiled(shipped, options)
            if not figures[1]:
                return figures
    return first


def _compiled(shipped: Any, options: dict[str, int]) -> tuple[int, int, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=shipped.kernel,
        signature=shipped.signature,
        constexprs=shipped.constants,
        attrs=shipped.attributes,
    )
    target = GPUTarget("cuda", shipped.capability, 32)
    binary = triton.compile(source, target=target, options=options)
    usage = _resource_usage(binary.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, f"cuobjdump said {usage!r}"
    return int(found[1]), int(found[2]) + int(found[3]), int(binary.metadata.shared)


def _resource_usage(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measure(compilations: Iterator[Compilation], capabilities: list[int]) -> list[Resources]:
    """The resources of all kernels, each kernel and configuration once."""
    found, seen = [], set()
    for compilation in compilations:
        for capability in capabilities:
            for shipped in kernels(compilation, capability):
                key = repr(shipped)
                if key in seen:
                    continue
                seen.add(key)
                found.append(_resources(compilation, shipped))
    return found


def _resources(compilation: Compilation, shipped: Any) -> Resources:
    from triton.compiler.errors import CompilationError

    error, figures = "", (0, 0, 0)
    try:
        figures = compiled(shipped)
    except CompilationError as failure:
        cause: BaseException = failure
        while cause.__cause__ is not None:
            cause = cause.__cause__
        error = str(cause)
    registers, spilled, shared = figures
    return Resources(
        kernel=shipped.name,
        capability=shipped.capability,
        method=compilation.method,
        dtype=compilation.dtype,
        precision=compilation.precision,
        algorithm=compilation.algorithm,
        tile=_tile(shipped.constants),
        warps=shipped.options.get("num_warps", 4),
        registers=registers,
        spilled=spilled,
        shared=shared,
        error=error,
    )


def _tile(constants: dict[str, Any]) -> str:
    """Rows, columns and the depth of a step, where the kernel works on tiles of pairs."""
    shape = constants.get("SHAPE")
    return "-" if shape is None else f"{shape.rows}x{shape.columns}x{shape.inner}"


def summary(found: list[Resources]) -> str:
    """Per kernel, dtype and precision the largest figures by architecture."""
    capabilities = sorted({one.capability for one in found})
    groups: dict[tuple[str, str, str], list[Resources]] = {}
    for one in found:
        groups.setdefault((one.kernel, one.dtype, one.precision), []).append(one)
    rows = []
    for (kernel, dtype, precision), group in sorted(groups.items()):
        cells = []
        for capability in capabilities:
            here = [one for one in group if one.capability == capability]
            cells.append(_cell(here) if here else "-")
        rows.append([kernel, dtype, precision, *cells])
    header = ["kernel", "dtype", "products", *(f"sm_{c}" for c in capabilities)]
    note = (
        f"{len(found)} kernels compiled; a cell has the tile, the warps, and the largest number of "
        "registers, of spilled bytes and of KB of shared memory over the losses.\n\n"
    )
    return note + table(header, rows)


def _cell(group: list[Resources]) -> str:
    tiles = ", ".join(sorted({f"{one.tile} w{one.warps}" for one in group}))
    if any(one.error for one in group):
        return "does not compile"
    registers, spilled = max(r.registers for r in group), max(r.spilled for r in group)
    kilobytes = max(r.shared for r in group) / 1024
    return f"{tiles}: {registers} r, {spilled} spilled, {kilobytes:.0f} KB"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--some", action="store_true", help="a representative part alone")
    parser.add_argument("--capability", type=int, action="append", choices=list(SHARED_LIMIT))
    parser.add_argument("--json", action="store_true", help="print every kernel as JSON")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="a page with the markers")
    options = parser.parse_args()
    compilations = some_compilations() if options.some else all_compilations()
    found = measure(compilations, options.capability or list(SHARED_LIMIT))
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in found]))
    elif options.update:
        page = options.update.read_text()
        options.update.write_text(insert(page, summary(found), "resources"))
    else:
        print(summary(found))
    return 0 if all(one.fits for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
