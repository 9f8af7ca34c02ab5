"""FeatureBank against a list that keeps every row: order, wrap-around, alignment and edges."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from affkd_kernels.bank import FeatureBank


def batch_of(rows: int, dim: int, start: int) -> torch.Tensor:
    """Rows that name themselves: row k is filled with start + k."""
    return torch.arange(start, start + rows, dtype=torch.float32)[:, None].expand(rows, dim)


@settings(max_examples=60)
@given(
    size=st.integers(1, 9),
    batches=st.lists(st.integers(0, 13), max_size=8),
)
def test_keys_are_the_newest_rows_in_batch_order(size: int, batches: list[int]) -> None:
    bank = FeatureBank(size, 2, 3)
    expected: list[float] = []
    start = 0
    for rows in batches:
        student, teacher = batch_of(rows, 2, start), batch_of(rows, 3, start)
        preview = bank.keys(student, teacher)
        bank.push(student, teacher)
        expected = ([float(start + k) for k in range(rows)] + expected)[:size]
        start += rows

        keys = bank.keys()
        assert [key[:, 0].tolist() for key in keys] == [expected, expected]
        # looking at a batch and pushing it agree on the order
        assert torch.equal(preview[0][: len(expected)], keys[0])
        assert len(bank) == len(expected) and bank.full == (len(expected) == size)


def test_one_queue_gives_a_tensor_and_no_copy_until_it_wraps() -> None:
    bank = FeatureBank(4, 2)
    assert bank.keys().shape == (0, 2)
    bank.push(batch_of(4, 2, 0))
    assert bank.keys().data_ptr() == bank._queues[0].data_ptr()
    bank.push(batch_of(1, 2, 9))
    assert bank.keys()[:, 0].tolist() == [9, 0, 1, 2]


def test_what_is_held_is_detached_and_not_the_callers_memory() -> None:
    bank = FeatureBank(4, 2, dtype=torch.float64)
    batch = torch.ones(2, 2, requires_grad=True)
    bank.push(batch)
    keys = bank.keys(batch)
    assert not keys.requires_grad and keys.dtype == torch.float64
    with torch.no_grad():
        batch.mul_(7)
    assert bank.keys().eq(1).all()


def test_nothing_enters_the_state_dict_and_copies_are_independent() -> None:
    bank = FeatureBank(3, 2)
    bank.push(batch_of(2, 2, 5))
    assert bank.state_dict() == {}
    twin = copy.deepcopy(bank)
    twin.push(batch_of(1, 2, 8))
    assert bank.keys()[:, 0].tolist() == [5, 6]
    assert twin.keys()[:, 0].tolist() == [8, 5, 6]
    twin.reset()
    assert len(twin) == 0 and twin.keys().shape == (0, 2)


def test_to_moves_the_queues() -> None:
    bank = FeatureBank(3, 2).to(torch.float64)
    bank.push(batch_of(2, 2, 0))
    assert bank.keys().dtype == torch.float64
    assert FeatureBank(3, 2).to("meta").keys().device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "size must be a positive integer, got 0"),
        ((4, 2.0), "dims must be a positive integer, got 2.0"),
        ((4, True), "dims must be a positive integer, got True"),
        ((4,), "dims must hold the embedding length"),
    ],
)
def test_bad_construction_names_the_argument(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureBank(*arguments)


@pytest.mark.parametrize(
    ("embeddings", "error", "message"),
    [
        ((torch.ones(2, 2),), ValueError, "2 tensors, one for each queue, got 1"),
        ((torch.ones(2, 3), torch.ones(2, 3)), ValueError, r"\[B, 2\], got \[2, 3\]"),
        ((torch.ones(2, 2), torch.ones(1, 3)), ValueError, "same samples, got 2 and 1 rows"),
        ((torch.ones(2, 2).int(), torch.ones(2, 3)), TypeError, "got torch.int32"),
        ((torch.ones(2, 2), None), TypeError, "got NoneType"),
        ((torch.ones(2, 2, device="meta"), torch.ones(2, 3)), ValueError, "device cpu, got meta"),
    ],
)
def test_bad_batches_name_what_came(embeddings: tuple, error: type, message: str) -> None:
    bank = FeatureBank(4, 2, 3)
    with pytest.raises(error, match=message):
        bank.push(*embeddings)
    with pytest.raises(error, match=message):
        bank.keys(*embeddings)
    assert len(bank) == 0


def test_the_queues_are_no_buffers_and_follow_the_module_all_the_same() -> None:
    model = nn.ModuleDict({"bank": FeatureBank(4, 2)})
    model["bank"].push(batch_of(3, 2, 1))
    # DistributedDataParallel copies the buffers of rank 0 over those of the others
    assert not list(model.buffers())
    model.half()
    assert model["bank"].keys().dtype == torch.float16
    assert model["bank"].keys()[:, 0].tolist() == [1, 2, 3]
    assert model.to("meta")["bank"].keys().device.type == "meta"
