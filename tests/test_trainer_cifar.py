"""CIFAR's own files: read as torchvision reads them, checked, and never a way to run code."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from torchvision import datasets

from affkd_kernels.trainer.config import DataConfig
from affkd_kernels.trainer.data import cifar, load_data
from affkd_kernels.trainer.data.tiny import write_tiny_cifar
from affkd_kernels.trainer.errors import FileContentError, MissingDataError

TORCHVISION = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def config(root, name="cifar100", **options):
    return DataConfig(name, root=str(root), **{"verify": False, **options})


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_cifar(tmp_path, "cifar100", train=40, test=20)


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_folder_is_read_as_torchvision_reads_it(tmp_path, monkeypatch, name):
    write_tiny_cifar(tmp_path, name, train=52, test=21)
    data = load_data(config(tmp_path, name))
    dataset = TORCHVISION[name]
    monkeypatch.setattr(dataset, "_check_integrity", lambda self: True)
    # its own check of the meta file stands apart from the others
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *arguments: True)
    for part, images, labels in (
        (dataset(tmp_path, train=True), data.train_images, data.train_labels),
        (dataset(tmp_path, train=False), data.test_images, data.test_labels),
    ):
        assert torch.equal(images.pixels.permute(0, 2, 3, 1), torch.from_numpy(part.data))
        assert labels.tolist() == part.targets
    assert data.classes == len(dataset(tmp_path).classes)


def test_images_are_standardized_by_channel(tiny):
    images = load_data(config(tiny.parent)).train_images
    std, mean = torch.std_mean(images[:], (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=1e-5, rtol=0)
    assert images.pixels.dtype == torch.uint8


def test_a_tar_gives_the_same_without_being_unpacked(tiny):
    folder = load_data(config(tiny.parent))
    pack(tiny)
    before = sorted(tiny.parent.iterdir())
    data = load_data(config(tiny.parent))
    assert torch.equal(data.train_images.pixels, folder.train_images.pixels)
    assert torch.equal(data.test_labels, folder.test_labels)
    assert sorted(tiny.parent.iterdir()) == before


def pack(folder):
    """Put the folder into the tar that its authors distribute, and take it away."""
    with tarfile.open(folder.parent / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.mark.parametrize("packed", [False, True])
def test_what_has_not_the_published_checksum_is_taken_on_demand_alone(tiny, packed):
    if packed:
        pack(tiny)
    with pytest.raises(FileContentError, match=r"MD5.*data\.verify: false") as error:
        load_data(config(tiny.parent, verify=True))
    expected = datasets.CIFAR100.tgz_md5 if packed else datasets.CIFAR100.train_list[0][1]
    assert expected in str(error.value)


def test_the_published_checksums_are_what_is_asked_for(tiny, monkeypatch):
    def entry(name):
        return [[name, hashlib.md5((tiny / name).read_bytes()).hexdigest()]]

    monkeypatch.setattr(datasets.CIFAR100, "train_list", entry("train"))
    monkeypatch.setattr(datasets.CIFAR100, "test_list", entry("test"))
    assert len(load_data(config(tiny.parent, verify=True)).train_labels) == 40
    content = bytearray((tiny / "test").read_bytes())
    content[5000] ^= 1
    (tiny / "test").write_bytes(content)
    with pytest.raises(FileContentError, match=r"test: its MD5 checksum"):
        load_data(config(tiny.parent, verify=True))


def test_missing_files_are_told_with_where_to_put_what(tmp_path, tiny):
    with pytest.raises(MissingDataError, match=r"nowhere.*cifar-100-python.*get http.*tar\.gz"):
        load_data(config(tmp_path / "nowhere"))
    (tiny / "test").unlink()
    with pytest.raises(MissingDataError, match=r"cifar-100-python/test is missing"):
        load_data(config(tiny.parent))


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("the file ran code",))


def written_by_cifar(pixels, labels):
    return {"data": pixels, "fine_labels": labels, "filenames": [], "coarse_labels": labels}


PIXELS = np.arange(3 * 3072, dtype=np.int64).astype(np.uint8).reshape(3, 3072)
HOSTILE = {
    "code": pickle.dumps(Payload(), protocol=2),
    "code among the labels": pickle.dumps(written_by_cifar(PIXELS, [0, Payload(), 1]), protocol=2),
    "a function": b"cos\nsystem\n.",
    "a call": b"cos\nsystem\n(S'true'\ntR.",
    "another codec": b"c_codecs\nencode\n(S'a'\nS'zlib'\ntR.",
    "an array's own constructor": b"cnumpy.core.multiarray\nfromstring\n(S'a'\ntR.",
    "nothing": b"",
    "text": b"hello",
    "no dict": pickle.dumps([1, 2], protocol=2),
    "no data": pickle.dumps({"fine_labels": [1]}, protocol=2),
    "data of another kind": pickle.dumps({"data": [1], "fine_labels": [1]}, protocol=2),
    "objects": pickle.dumps(written_by_cifar(np.array([[None] * 3072] * 3), [0, 1, 2]), protocol=2),
    "wide": pickle.dumps(written_by_cifar(PIXELS[:, :9], [0, 1, 2]), protocol=2),
    "floats": pickle.dumps(written_by_cifar(PIXELS / 2, [0, 1, 2]), protocol=2),
    "a label too many": pickle.dumps(written_by_cifar(PIXELS, [0, 1, 2, 3]), protocol=2),
    "a label too large": pickle.dumps(written_by_cifar(PIXELS, [0, 1, 100]), protocol=2),
    "a negative label": pickle.dumps(written_by_cifar(PIXELS, [0, 1, -1]), protocol=2),
    "labels that are none": pickle.dumps(written_by_cifar(PIXELS, [0, 1, 1.5]), protocol=2),
    "an array without a state": b"}(S'data'\ncnumpy\nndarray\n)RS'fine_labels'\n]u.",
    "a recursive dict": b"}q\x00(S'data'\nh\x00u.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_or_damaged_file_is_named_and_not_run(tiny, content):
    (tiny / "test").write_bytes(content)
    with pytest.raises(FileContentError, match=r"cifar-100-python/test: not a file in CIFAR's"):
        load_data(config(tiny.parent))


@pytest.mark.parametrize("length", [10, 3000, -1])
def test_a_file_cut_short_is_named(tiny, length):
    (tiny / "train").write_bytes((tiny / "train").read_bytes()[:length])
    with pytest.raises(FileContentError, match=r"cifar-100-python/train: not a file"):
        load_data(config(tiny.parent))


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_read_in_either_order(tiny, order):
    content = written_by_cifar(np.asarray(PIXELS, order=order), [7, 8, 9])
    (tiny / "test").write_bytes(pickle.dumps(content, protocol=2))
    data = load_data(config(tiny.parent))
    assert np.array_equal(data.test_images.pixels.flatten(1).numpy(), PIXELS)
    assert data.test_labels.tolist() == [7, 8, 9]


def test_the_text_of_python_2_is_read_too(tiny):
    """The published files: written by Python 2, whose strings are bytes, with NumPy's old names."""
    state = (
        b"(I1\n(I1\nI3072\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n"
    )
    pixels = bytes(range(256)) * 12
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        + state + b"T" + len(pixels).to_bytes(4, "little") + pixels + b"tb"
    )  # fmt: skip
    labels = b"(lI5\na"
    (tiny / "test").write_bytes(b"(dS'data'\n" + array + b"sS'fine_labels'\n" + labels + b"s.")
    # the hand-written file is what pickle itself takes for it
    whole = pickle.loads((tiny / "test").read_bytes(), encoding="latin1")
    assert whole["fine_labels"] == [5] and whole["data"].tobytes() == pixels
    data = load_data(config(tiny.parent))
    assert data.test_images.pixels.numpy().tobytes() == pixels and data.test_labels.tolist() == [5]


def test_a_hostile_tar_is_named(tiny):
    pack(tiny)
    archive = tiny.parent / "cifar-100-python.tar.gz"
    whole = archive.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        archive.write_bytes(content)
        with pytest.raises(FileContentError, match=r"cifar-100-python\.tar\.gz: not a tar"):
            load_data(config(tiny.parent))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_tar_cannot_point_at_other_files(tmp_path, kind):
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("cifar-100-python/train")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(FileContentError, match=r"train: not a regular file"):
        load_data(config(tmp_path))


def test_a_file_that_would_fill_the_memory_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(cifar, "LARGEST_FILE", 1000)
    with pytest.raises(FileContentError, match=r"train: too large: \d+ bytes, at most 1000"):
        load_data(config(tiny.parent))
    pack(tiny)
    with pytest.raises(FileContentError, match=r"train: too large"):
        load_data(config(tiny.parent))


def test_a_data_set_is_never_written_over_and_needs_some_images(tmp_path):
    write_tiny_cifar(tmp_path, "cifar10", train=10, test=10)
    with pytest.raises(FileExistsError):
        write_tiny_cifar(tmp_path, "cifar10")
    with pytest.raises(ValueError, match="train must be at least 5 images, got 4"):
        write_tiny_cifar(tmp_path / "other", train=4)
    with pytest.raises(ValueError, match="'mnist'; valid are cifar10, cifar100"):
        write_tiny_cifar(tmp_path / "other", "mnist")


def test_the_restricted_reader_reads_nothing_else():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = (
            pickle.dumps(io.BytesIO(b"x").read, protocol) if protocol > 3 else b"cos\n_exit\n."
        )
        with pytest.raises(pickle.UnpicklingError, match="is not part of the format"):
            cifar._CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
