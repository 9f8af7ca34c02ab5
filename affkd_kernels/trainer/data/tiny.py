"""A tiny data set in CIFAR's own format, to try what reads the real one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np

SIDE = 32
CLASSES = {"cifar10": 10, "cifar100": 100}
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}


def write_tiny_cifar(
    root: Path,
    name: Literal["cifar10", "cifar100"] = "cifar100",
    train: int = 500,
    test: int = 200,
    seed: int = 0,
) -> Path:
    """Write noisy images of one pattern a class where ``data.root`` expects the data set.

    It has torchvision's file names but not its checksums, so a run takes it with
    ``data.verify: false`` only.

    Returns:
        The folder that was written.

    Raises:
        ValueError: an unknown name, or fewer images than a data set can be split from.
        FileExistsError: the folder is there; a real data set is never written over.
    """
    from torchvision import datasets

    if name not in CLASSES:
        raise ValueError(f"name is {name!r}; valid are {', '.join(CLASSES)}")
    for part, count in (("train", train), ("test", test)):
        if count < 5:
            raise ValueError(f"{part} must be at least 5 images, got {count}")
    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = Path(root) / dataset.base_folder
    folder.mkdir(parents=True, exist_ok=False)
    random = np.random.default_rng(seed)
    # coarse, so that a crop or a flip leaves most of a pattern recognizable
    patterns = random.integers(0, 256, (CLASSES[name], 3, 4, 4)).repeat(8, 2).repeat(8, 3)
    for files, count in ((dataset.train_list, train), (dataset.test_list, test)):
        parts = np.array_split(random.permutation(count) % CLASSES[name], len(files))
        for (file, _), labels in zip(files, parts, strict=True):
            _write(folder / file, _batch(patterns[labels], labels, LABELS[name], random))
    names = [f"class {number}" for number in range(CLASSES[name])]
    _write(folder / dataset.meta["filename"], {dataset.meta["key"]: names})
    return folder


def _batch(
    patterns: np.ndarray, labels: np.ndarray, key: str, random: np.random.Generator
) -> dict[str, Any]:
    noisy = patterns + random.normal(0, 40, patterns.shape)
    pixels = noisy.clip(0, 255).astype(np.uint8).reshape(len(labels), -1)
    files = [f"tiny_{number}.png" for number in range(len(labels))]
    return {"data": pixels, key: labels.tolist(), "filenames": files}


def _write(path: Path, content: dict[str, Any]) -> None:
    # the protocol of the real files
    path.write_bytes(pickle.dumps(content, protocol=2))
