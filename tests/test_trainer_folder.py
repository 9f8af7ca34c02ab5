"""Trees of one's own images: classes from folders, squares of one size, clear errors."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from affkd_kernels.trainer.config import DataConfig
from affkd_kernels.trainer.data import load_data
from affkd_kernels.trainer.errors import FileContentError, MissingDataError


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two classes of six and two images, of several sizes and kinds."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                shape = [(8, 8, 3), (8, 12, 3), (20, 16, 3), (9, 9), (16, 16, 4)][number % 5]
                array = random.integers(0, 256, shape, dtype=np.uint8)
                write(tmp_path / part / label / f"{number}.png", array)
    return tmp_path


def load(root, **options):
    return load_data(DataConfig("folder", root=str(root), image_size=8, **options))


def test_images_of_any_size_become_squares_of_bytes_with_their_folders_label(tree):
    data = load(tree)
    assert data.train_images.pixels.shape == (12, 3, 8, 8)
    assert data.train_images.pixels.dtype == torch.uint8
    assert data.train_labels.bincount().tolist() == [6, 6] and data.classes == 2
    for label, name in enumerate(("cat", "dog")):
        exact = torch.from_numpy(np.array(Image.open(tree / f"test/{name}/0.png")).copy())
        first = data.test_images.pixels[data.test_labels == label][0]
        assert torch.equal(first, exact.permute(2, 0, 1))
    assert data.identity["image_size"] == 8


def test_a_limit_takes_images_of_every_class(tree):
    limited = load(tree, limit=8)
    assert len(limited.train_labels) == 8
    assert limited.train_labels.unique().tolist() == [0, 1]


def test_val_is_a_name_for_the_test_images_too(tree):
    (tree / "test").rename(tree / "val")
    assert len(load(tree).test_labels) == 4


def test_what_is_missing_is_told_with_where_to_put_it(tree, tmp_path):
    with pytest.raises(MissingDataError, match=r"nowhere has no folder train; put .*train/CLASS/"):
        load(tmp_path / "nowhere")
    (tree / "test").rename(tree / "elsewhere")
    with pytest.raises(MissingDataError, match=r"no folder test or val"):
        load(tree)


def test_other_classes_in_the_test_images_are_named(tree):
    (tree / "test/dog").rename(tree / "test/wolf")
    with pytest.raises(ValueError, match="only one of them has dog, wolf"):
        load(tree)


def huge_image():
    """A valid PNG of a few bytes that says it is 30,000 x 30,000."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", huge_image()])
def test_a_damaged_or_hostile_image_is_named(tree, content):
    (tree / "train/cat/3.png").write_bytes(content)
    with pytest.raises(FileContentError, match=r"train/cat/3\.png: not an image"):
        load(tree)
