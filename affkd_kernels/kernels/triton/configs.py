"""Tile sizes, warps and stages by architecture and dtype: a small table, no autotuning.

What ships compiles without spilling registers (tests/test_triton_aot.py).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .choices import Shape

# Triton reads it once, when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# bytes that `tiled` holds of V at a time, where the caller sets no limit
PANEL_BYTES = 64 << 20
# programs per multiprocessor that keep a GPU busy
PROGRAMS = 2
# a stash: rows of a matrix up to which a batch is an everyday one, where launches decide
STASH_QUERIES = 1024
# and how many parts the last kernel, and every program that needs a statistic, may have to add up
STASH_PARTS, STASH_TILES = 16384, 8192
# architectures with 228 KiB of shared memory and warp-group products, where a tile may be larger
_LARGE = (90, 100)
# registers that a thread may have where a kernel spills under the limit that it has at first
_REGISTERS = (128, 96, 168, 192, 255)


class Config(NamedTuple):
    """A tile's shape with the options it is launched with."""

    shape: Shape
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# the interpreter's time is the number of tiles, and small tests should have some; not square, so
# that rows and columns cannot be taken for each other
_INTERPRETER = Config(Shape(32, 16, 16, "ieee", True), 4, 1)


class Operands(NamedTuple):
    """What a tile of pairs is made of."""

    dtype: torch.dtype
    precision: str  # of its products
    mixed: bool  # whether operands of several dtypes meet
    aligned: bool  # whether rows of features load 16 bytes at a time
    pair_mask: bool  # which has an address for every pair

    @property
    def crowded(self) -> bool:
        """Without products on tensor cores, or with an address for every number, less fits."""
        half = self.dtype.itemsize == 2
        return not self.aligned or (self.precision == "ieee" and not half)

    def shape(self, rows: int, columns: int, inner: int) -> Shape:
        return Shape(rows, columns, inner, self.precision, self.mixed)


def dot_precision() -> str:
    """The precision of float32 products, by what the caller has set for PyTorch's own."""
    if torch.version.hip is not None:
        return "ieee"
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:
        # the newer setting is in use, which the older getter refuses to read
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[setting]


def precision_of_copies() -> str:
    """Of float32 products of what was of half precision: three tf32 products have digits enough."""
    return "ieee" if torch.version.hip is not None else "tf32x3"


@functools.lru_cache(maxsize=16)
def architecture(device: torch.device) -> tuple[int, int]:
    """Compute capability, as in 90, and the number of multiprocessors."""
    if device.type != "cuda":
        return 0, 1
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def sweep_config(capability: int, operands: Operands) -> Config:
    """Of the sweeps that compute their pairs."""
    if capability == 0:
        return _INTERPRETER
    if operands.crowded:
        return Config(operands.shape(32, 32, 16), 8, 2)
    if capability in _LARGE:
        return Config(operands.shape(64, 32, 32), 8, 3)
    if operands.precision == "tf32x3":
        return Config(operands.shape(32 if operands.pair_mask else 64, 32, 16), 8, 3)
    return Config(operands.shape(32, 32, 32), 8, 3)


def gradient_config(capability: int, operands: Operands) -> Config:
    """Of the sweep for V alone, a tile a program."""
    wide = capability in _LARGE and operands.dtype != torch.float64
    if not wide or not operands.aligned or operands.pair_mask:
        return sweep_config(capability, operands)
    if operands.crowded:
        return Config(operands.shape(64, 64, 16), 8, 2)
    return Config(operands.shape(64, 64, 32), 8, 3)


def held_config(capability: int) -> Config:
    """Of the sweeps over values that are held."""
    if capability == 0:
        return _INTERPRETER
    return Config(Shape(32, 32, 16, "ieee", False), 8, 1)


_DOUBLE_PRODUCT = Config(Shape(32, 32, 16, "ieee", True), 4, 2)


def _precision_of_product(dtype: torch.dtype, precision: str) -> str:
    """float16 is exact as tf32, so that only V needs several."""
    return "tf32x3" if dtype == torch.float16 and torch.version.hip is None else precision


def product_config(capability: int, dtype: torch.dtype, precision: str) -> Config:
    """Of the product of V with features of a dtype."""
    if capability == 0:
        return _INTERPRETER
    if dtype == torch.float64:
        return _DOUBLE_PRODUCT
    precision = _precision_of_product(dtype, precision)
    if dtype != torch.bfloat16 and precision == "ieee":
        return Config(Shape(64, 32, 32, precision, True), 8, 2)
    # operands of warp-wide float32 products lie in registers, each in parts
    inner = 32 if capability in _LARGE else 16
    return Config(Shape(64, 64, inner, precision, True), 8, 3)


def stash_config(capability: int, operands: Operands) -> Config:
    """Of the kernel that fills a stash, for which small tiles make programs enough."""
    if capability == 0:
        return _INTERPRETER
    if operands.crowded:
        return Config(operands.shape(32, 32, 16), 8, 2)
    return Config(operands.shape(32, 32, 32), 4, 3)


def rows_config(capability: int, keys: int) -> Config:
    """Of the kernel that takes whole rows of a stash, few at a time: there are programs enough."""
    if capability == 0:
        return _INTERPRETER
    # four pairs a thread, and, up to 1024 keys, all of a row at once
    columns = next((n for n in (128, 256, 512) if keys <= n), 1024)
    shape = Shape(max(512 // columns, 1), columns, 16, "ieee", False)
    return Config(shape, max(columns, 512) // 128, 1)


def multiply_config(capability: int, dtype: torch.dtype, precision: str) -> Config:
    """Of the product of a stash with features of a dtype."""
    if capability == 0:
        return _INTERPRETER
    if dtype == torch.float64:
        return _DOUBLE_PRODUCT
    return Config(Shape(32, 32, 32, _precision_of_product(dtype, precision), True), 8, 2)


def small_options(capability: int, dtype: torch.dtype) -> dict[str, int]:
    """Of the kernels that go over items or rows, not over pairs."""
    if capability == 0 or torch.version.hip is not None:
        return {}
    # left alone, the assembler saves registers that nothing else wants, and spills
    return {"maxnreg": 128 if dtype == torch.float64 else 64}


def other_options(options: dict[str, int]) -> Iterator[dict[str, int]]:
    """With which to compile a kernel instead that spills, in this order.

    How many registers NVIDIA's assembler settles for changes with every line of a kernel: now and
    then it stays a register short of what it needs, for the sake of a program more at once. Where
    255 are not enough, as with masks of pairs, less is loaded ahead or more threads share a tile.
    """
    if torch.version.hip is None:
        for registers in _REGISTERS:
            yield {**options, "maxnreg": registers}
    if "num_warps" in options:
        yield {**options, "num_stages": 1}
        yield {**options, "num_warps": 2 * options["num_warps"]}


def splits_of(blocks: int, tiles: int, multiprocessors: int) -> tuple[int, int]:
    """How many programs share the tiles of a block, and how many tiles each takes."""
    wanted = -(-PROGRAMS * multiprocessors // max(blocks, 1))
    each = -(-tiles // max(1, min(wanted, tiles)))
    return -(-tiles // each), each


def repeatable(config: Config, self_affinity: bool) -> Config:
    """The same for every sweep of a call that compares its pairs with their maximum.

    Of a self-affinity the tiles are square, so that those below the diagonal mirror those above:
    the order in which a product adds up may depend on where in its tile a pair is. Turning a tile
    takes registers, which shorter steps along the features save.
    """
    if not self_affinity:
        return config
    edge = min(config.shape.rows, config.shape.columns)
    shape = dataclasses.replace(config.shape, rows=edge, columns=edge, inner=16, mirrored=True)
    return config._replace(shape=shape)


def addressed(config: Config, keys: int, length: int) -> Config:
    """With 64-bit addresses inside a tile where, of very many keys or of very long features, it
    reaches further than 32 bits do."""
    shape = config.shape
    reach = max(shape.rows * keys, max(shape.rows, shape.columns) * length)
    if reach < 1 << 31:
        return config
    return config._replace(shape=dataclasses.replace(shape, wide=True))
