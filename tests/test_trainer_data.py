"""The shipped data sets, the choice of labels, and a batch order that survives a restart."""

from __future__ import annotations

import pytest
import torch

from affkd_kernels.trainer.config import DataConfig, TeacherConfig, TrainConfig
from affkd_kernels.trainer.data import Batch, BatchOrder, labeled_rows, load_data
from affkd_kernels.trainer.data.augment import apply_changes, draw_changes


@pytest.mark.parametrize(
    ("name", "train", "test", "side"),
    [
        ("mnist5k", 4000, 1000, 28),
        ("digits", 1438, 359, 8),
    ],
)
def test_data_sets_are_whole_shuffled_and_standardized(name, train, test, side):
    data = load_data(DataConfig(name))
    assert data.train_images[:].shape == (train, 1, side, side)
    assert data.test_images[:].shape == (test, 1, side, side)
    assert data.classes == 10
    # sorted files would leave whole classes out of one of the parts
    assert data.train_labels.bincount().min() > 0.07 * train
    assert data.test_labels.bincount().min() > 0.07 * test
    std, mean = torch.std_mean(data.train_images[:])
    assert abs(mean) < 1e-3 and abs(std - 1) < 1e-3


def test_split_has_no_image_on_both_sides_and_depends_on_its_seed_alone():
    first, again = load_data(DataConfig("digits")), load_data(DataConfig("digits", batch_size=7))
    other = load_data(DataConfig("digits", split_seed=1))
    assert torch.equal(first.train_images[:], again.train_images[:])
    assert not torch.equal(first.train_labels, other.train_labels)
    distances = torch.cdist(first.test_images[:].flatten(1), first.train_images[:].flatten(1))
    assert distances.min() > 0


def test_limit_shortens_the_training_part_only():
    whole, short = load_data(DataConfig("digits")), load_data(DataConfig("digits", limit=100))
    assert len(short.train_labels) == 100
    assert torch.equal(short.train_labels, whole.train_labels[:100])
    assert torch.equal(short.test_labels, whole.test_labels)


def test_unknown_data_set_is_named_with_the_valid_ones():
    with pytest.raises(ValueError, match="'cifar'.*cifar10, cifar100, digits, folder, mnist5k"):
        load_data(DataConfig("cifar"))


def test_labeled_rows_are_balanced_and_change_with_the_seed():
    labels = torch.arange(10).repeat(30)
    rows = labeled_rows(labels, 4, seed=0)
    assert labels[rows].bincount().tolist() == [4] * 10
    assert torch.equal(rows, labeled_rows(labels, 4, seed=0))
    assert not torch.equal(rows, labeled_rows(labels, 4, seed=1))
    assert len(labeled_rows(labels, 0, seed=0)) == 0
    assert torch.equal(labeled_rows(labels, None, seed=0), torch.arange(300))


@pytest.mark.parametrize("seed", range(3))
def test_the_kept_labels_are_not_the_first_images_of_the_first_epoch(seed):
    labels = torch.arange(10).repeat(200)
    kept = labeled_rows(labels, 10, seed)
    order = BatchOrder(len(labels), kept, DataConfig(batch_size=200), seed)
    first = next(order.epoch()).rows
    # 100 kept of 2,000, so 10 of 200 by chance, with a standard deviation of 2.9
    assert torch.isin(first, kept).sum() < 25


def test_a_data_set_says_which_images_it_trains_on_and_how_they_were_standardized():
    data = load_data(DataConfig("digits", split_seed=3, limit=100))
    asked = {"name": "digits", "split_seed": 3, "limit": 100}
    assert asked.items() <= data.identity.items()
    raw = load_data(DataConfig("digits", split_seed=3)).identity
    assert data.identity["mean"] != raw["mean"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 3}, "limit must be at least 5, got 3"),
        ({"split_seed": -1}, "split_seed must be from 0"),
        ({"split_seed": 10**30}, "split_seed must be from 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig("digits", **options)


def test_an_epoch_holds_every_row_once():
    order = BatchOrder(53, torch.arange(53), DataConfig(batch_size=8), seed=0)
    first, second = (torch.cat([b.rows for b in order.epoch()]) for _ in range(2))
    assert order.steps_per_epoch == 7
    assert torch.equal(first.sort().values, torch.arange(53))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 7])
def test_a_restored_order_goes_on_to_the_bit(stop):
    def fresh(seed):
        return BatchOrder(53, torch.tensor([3, 5, 11, 40]), DataConfig(batch_size=8), seed)

    whole, interrupted, restored = fresh(seed=2), fresh(seed=2), fresh(seed=9)
    expected = [*whole.epoch(), *whole.epoch()]
    for _ in zip(range(stop), interrupted.epoch(), strict=False):
        pass
    restored.load_state_dict(interrupted.state_dict())
    found = [*restored.epoch(), *restored.epoch()][: len(expected) - stop]
    assert len(found) > 0
    for batch, wanted in zip(found, expected[stop:], strict=False):
        assert torch.equal(batch.rows, wanted.rows)
        assert torch.equal(batch.labeled, wanted.labeled)


def test_a_last_batch_that_cannot_be_divided_is_left_out():
    order = BatchOrder(50, torch.arange(50), DataConfig(batch_size=8), seed=0, smallest=3)
    assert order.steps_per_epoch == 6
    first, second = ([len(batch.rows) for batch in order.epoch()] for _ in range(2))
    assert first == second == [8] * 6


@pytest.mark.parametrize("apart", [False, True])
def test_the_parts_of_a_batch_hold_its_images_and_their_changes_once(apart):
    rows = torch.arange(100, 111)
    labeled = torch.arange(200, 205) if apart else rows
    whole = Batch(rows, labeled)
    whole = whole._replace(changes=whole.images[:, None].expand(-1, 3))
    parts = [whole.part(index, 3) for index in range(3)]
    assert [len(part.rows) for part in parts] == [4, 4, 3]
    for part in parts:
        assert part.apart == apart
        assert torch.equal(part.changes[:, 0], part.images)
    for field in ("rows", "labeled"):
        joined = torch.cat([getattr(part, field) for part in parts]).sort().values
        assert torch.equal(joined, getattr(whole, field))


def test_a_changed_image_is_a_crop_of_the_padded_one_mirrored_or_not():
    pixels = torch.randint(1, 256, (40, 3, 6, 5), dtype=torch.uint8)
    config = DataConfig(crop_padding=2, flip=True)
    changes = draw_changes(config, 40, seed=3, step=7)
    found = apply_changes(pixels, changes, padding=2)
    for image, (top, left, mirrored), crop in zip(pixels, changes.tolist(), found, strict=True):
        padded = torch.zeros(3, 10, 9, dtype=torch.uint8)
        padded[:, 2:8, 2:7] = image
        expected = padded[:, top : top + 6, left : left + 5]
        assert torch.equal(crop, expected.flip(2) if mirrored else expected)
    # every shift and both directions come up
    for column, count in enumerate((5, 5, 2)):
        assert changes[:, column].unique().tolist() == list(range(count))


def test_changes_depend_on_seed_and_step_alone_and_can_be_switched_off():
    config = DataConfig(crop_padding=4, flip=True)
    first = draw_changes(config, 64, seed=1, step=5)
    assert torch.equal(first, draw_changes(config, 64, seed=1, step=5))
    for seed, step in ((2, 5), (1, 6)):
        assert not torch.equal(first, draw_changes(config, 64, seed, step))
    assert draw_changes(DataConfig(), 64, seed=1, step=5) is None
    shifted = draw_changes(DataConfig(crop_padding=4), 64, seed=1, step=5)
    assert shifted[:, 2].sum() == 0


def test_a_validation_part_is_of_the_training_images_and_hides_the_test_images():
    whole = load_data(DataConfig("digits"))
    held = load_data(DataConfig("digits", validation=0.25))
    count = len(whole.train_labels)
    assert len(held.test_labels) == round(0.25 * count)
    assert len(held.train_labels) == count - len(held.test_labels)

    def distances(first, second):
        return torch.cdist(first.pixels.flatten(1), second.pixels.flatten(1))

    assert distances(held.test_images, whole.train_images).min(1).values.max() == 0
    assert distances(held.test_images, held.train_images).min() > 0
    assert distances(held.test_images, whole.test_images).min() > 0
    assert held.identity["validation"] == 0.25


def test_augmented_images_cannot_have_a_cached_teacher():
    with pytest.raises(ValueError, match=r"teacher\.cache is true, but data\.crop_padding"):
        TrainConfig(data=DataConfig(flip=True), teacher=TeacherConfig(cache=True))
