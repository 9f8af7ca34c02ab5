"""CIFAR-10 and CIFAR-100 in the python format of their authors, folder or tar, nothing executed.

The files are pickles, which can run any code when they are read by ``pickle.load``. Here only what
such a file needs is understood: dicts, lists, numbers, strings, and arrays of bytes. Names, folders
and checksums are torchvision's.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from affkd_kernels.trainer.config import DataConfig
from affkd_kernels.trainer.data.images import ImageData, standardized_parts
from affkd_kernels.trainer.errors import FileContentError, MissingDataError, reading

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

SIDE = 32
VALUES = 3 * SIDE * SIDE
# the largest real file, CIFAR-100's training part, has 155 MB
LARGEST_FILE = 2**28


def cifar10(config: DataConfig) -> ImageData:
    """50,000 and 10,000 images of 10 classes; Krizhevsky 2009."""
    from torchvision.datasets import CIFAR10

    return _load(CIFAR10, "labels", 10, config)


def cifar100(config: DataConfig) -> ImageData:
    """50,000 and 10,000 images of 100 classes; Krizhevsky 2009."""
    from torchvision.datasets import CIFAR100

    return _load(CIFAR100, "fine_labels", 100, config)


def _load(dataset: type[CIFAR10], labels: str, classes: int, config: DataConfig) -> ImageData:
    read = _source(dataset, Path(config.root), config.verify)
    train, test = (
        _join([_decode(*read(name, md5), labels, classes) for name, md5 in files])
        for files in (dataset.train_list, dataset.test_list)
    )
    limited = (train[0][: config.limit], train[1][: config.limit])
    return standardized_parts(limited, test, classes)


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


Read = Callable[[str, str], tuple[Path, bytes]]


def _source(dataset: type[CIFAR10], root: Path, verify: bool) -> Read:
    """A function that returns the path and the checked content of a file of the data set."""
    folder, archive = root / dataset.base_folder, root / dataset.filename
    if folder.is_dir():
        read = _read_folder(folder)
    elif archive.is_file():
        if verify:
            _require_md5(archive, archive.read_bytes(), dataset.tgz_md5)
        read = _read_archive(archive, dataset.base_folder)
    else:
        names = ", ".join(name for name, _ in (*dataset.train_list, *dataset.test_list))
        raise MissingDataError(
            f"data.root: {root} holds neither the folder {dataset.base_folder} (with {names}) nor "
            f"the file {dataset.filename}; get {dataset.url} and put it there, or give the folder "
            "that has it as data.root"
        )

    def checked(name: str, md5: str) -> tuple[Path, bytes]:
        path, content = read(name)
        if verify:
            _require_md5(path, content, md5)
        return path, content

    return checked


def _require_md5(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise FileContentError(
            path,
            f"its MD5 checksum is {found} and should be {expected}: the file is damaged, or it is "
            "another data set in this format, which data.verify: false takes",
        )


def _read_folder(folder: Path) -> Callable[[str], tuple[Path, bytes]]:
    def read(name: str) -> tuple[Path, bytes]:
        path = folder / name
        if not path.is_file():
            raise MissingDataError(f"{path} is missing: the data set in {folder} is incomplete")
        _require_size(path, path.stat().st_size)
        return path, path.read_bytes()

    return read


def _read_archive(archive: Path, folder: str) -> Callable[[str], tuple[Path, bytes]]:
    """Files of the tar, taken by their exact names and never unpacked to the disk."""

    def read(name: str) -> tuple[Path, bytes]:
        path = archive / folder / name
        with reading(archive, "a tar of the data set"), tarfile.open(archive) as tar:
            member = tar.getmember(f"{folder}/{name}")
            file = tar.extractfile(member) if member.isreg() else None
            if file is None:
                raise FileContentError(path, "not a regular file")
            _require_size(path, member.size)
            return path, file.read()

    return read


def _require_size(path: Path, size: int) -> None:
    if size > LARGEST_FILE:
        raise FileContentError(path, f"too large: {size} bytes, at most {LARGEST_FILE} are taken")


def _decode(path: Path, content: bytes, labels: str, classes: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] uint8 and labels [N] int64 of one file."""
    with reading(path, "a file in CIFAR's python format"):
        table = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
        named = {_text(key): value for key, value in table.items()}
        return _images(named["data"]), _labels(named, labels, classes)


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _images(array: Any) -> Tensor:
    if not isinstance(array, _Array):
        raise ValueError(f"data must be an array, got {type(array).__name__}")
    return torch.from_numpy(array.bytes_of(VALUES)).reshape(-1, 3, SIDE, SIDE)


def _labels(table: Mapping[str, Any], name: str, classes: int) -> Tensor:
    labels = table[name]
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise ValueError(f"{name} must be a list of integers")
    if len(labels) != table["data"].count:
        raise ValueError(f"{len(labels)} {name} of {table['data'].count} images")
    if labels and not 0 <= min(labels) <= max(labels) < classes:
        raise ValueError(f"{name} must be from 0 to {classes - 1}")
    return torch.tensor(labels, dtype=torch.int64)


class _Array:
    """Stands for a NumPy array: it keeps what the pickle says of it, and lets nobody else see."""

    def __init__(self, *arguments: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    @property
    def count(self) -> int:
        return self.state[1][0]

    def bytes_of(self, width: int) -> np.ndarray:
        """The array, which must be [N, width] of unsigned bytes."""
        _, shape, kind, fortran, content = self.state
        if not (isinstance(kind, _Kind) and kind.name in ("u1", b"u1")):
            raise ValueError("data must hold unsigned bytes")
        if len(shape) != 2 or shape[1] != width or len(content) != shape[0] * width:
            raise ValueError(f"data must be N rows of {width} values, got shape {shape}")
        values = np.frombuffer(content, np.uint8)
        rows = values.reshape(width, -1).T if fortran else values.reshape(-1, width)
        # a copy, because a tensor must be able to write to its memory
        return rows.copy(order="C")


class _Kind:
    """Stands for the type of an array's entries."""

    def __init__(self, name: Any, *arguments: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which a type of one byte has not."""


def _bytes_from_text(text: str, encoding: str) -> bytes:
    # protocol 2 of Python 3 has no bytes and writes them as text in this encoding
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in {encoding!r} is not part of the format")
    return text.encode("latin1")


_UNDERSTOOD: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _bytes_from_text,
}


class _CifarUnpickler(pickle.Unpickler):
    """Knows the handful of names that CIFAR's files use, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _UNDERSTOOD:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of the format")
        return _UNDERSTOOD[module, name]
