import numpy as np
import pytest
import torch

from compressor import Augmentation, Samples
from compressor.errors import InputError
from compressor.training.sampling import TrainingData, divide_batch, training_batches

MOVED = Augmentation(2, lambda inputs, uniform: (inputs[0] + uniform.mean(dim=1)[:, None], inputs[1]))


def numbered(samples: int, first: int = 0) -> Samples:
    """Two inputs, each with the number of its sample, and that number as the target."""
    numbers = torch.arange(first, first + samples)
    return Samples((numbers.float().unsqueeze(1), numbers.unsqueeze(1).repeat(1, 3)), numbers)


class OneByOne(torch.utils.data.Dataset):
    """The same samples, not in memory."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        inputs, target = self.samples[index]
        return inputs, int(target)


def drawn(data, batch_size=8, *, epochs=1, seed=0, processes=1):
    """The batches of all epochs, a list for each process."""
    plan = divide_batch(data, batch_size, processes)
    return [
        list(training_batches(data, plan, epochs=epochs, seed=seed, process=process, processes=processes))
        for process in range(processes)
    ]


def semi_supervised(labeled=12, unlabeled=36, share=0.75, **settings):
    return TrainingData(numbered(labeled), numbered(unlabeled, 100), unlabeled_share=share, **settings)


def test_every_sample_is_drawn_once_per_epoch_in_another_order():
    (batches,) = drawn(TrainingData(numbered(40)), epochs=3)
    epochs = [torch.cat([batch.targets for batch in batches[5 * i : 5 * i + 5]]).tolist() for i in range(3)]
    assert [len(batch.targets) for batch in batches] == [8] * 15
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_incomplete_batch_is_left_out():
    (batches,) = drawn(TrainingData(numbered(43)))
    assert len(batches) == 5
    assert len({row for batch in batches for row in batch.rows}) == 40


def test_batch_is_smaller_where_there_are_fewer_samples():
    (batches,) = drawn(TrainingData(numbered(5)), batch_size=8, epochs=2)
    assert [sorted(batch.rows) for batch in batches] == [list(range(5))] * 2


def test_order_follows_from_the_seed_alone():
    first, again, other = (
        [batch.rows.tolist() for batch in drawn(TrainingData(numbered(40)), epochs=2, seed=seed)[0]]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_unlabeled_samples_are_their_share_of_every_batch_and_lie_behind_the_labeled():
    (batches,) = drawn(semi_supervised(), epochs=2)
    assert len(batches) == 12  # 48 samples, 8 a time, twice
    for batch in batches:
        assert len(batch.rows) == len(batch.inputs[0]) == len(batch.inputs[1]) == 8
        assert batch.targets.tolist() == batch.rows[:2].tolist() == batch.inputs[0][:2, 0].tolist()
        assert (batch.inputs[0][2:] >= 100).all()
        assert (batch.rows[2:] >= 12).all()


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.25, 2), (0.5, 4), (0.8, 6), (0.9, 7)])
def test_share_of_unlabeled_samples_is_the_nearest_whole_number(share, count):
    plan = divide_batch(semi_supervised(share=share), 8, 1)
    assert (plan.labeled, plan.unlabeled, plan.steps) == (8 - count, count, 6)


def test_every_unlabeled_sample_is_drawn_once_per_epoch_if_the_share_is_theirs():
    (batches,) = drawn(semi_supervised())
    assert sorted(torch.cat([batch.inputs[0][2:, 0] for batch in batches]).tolist()) == list(range(100, 136))
    assert sorted(torch.cat([batch.targets for batch in batches]).tolist()) == list(range(12))


def test_small_labeled_split_is_gone_through_again_and_evenly():
    (batches,) = drawn(semi_supervised(labeled=5, unlabeled=43, share=0.5))
    targets = torch.cat([batch.targets for batch in batches])
    assert len(targets) == 24
    rounds = [targets[start : start + 5].tolist() for start in range(0, 20, 5)]
    assert all(sorted(one) == list(range(5)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert targets.bincount().tolist() in ([5, 5, 5, 5, 4][i:] + [5, 5, 5, 5, 4][:i] for i in range(5))


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_of_the_processes_make_up_the_batch_of_one(processes):
    data = TrainingData(numbered(24), numbered(24, 100), unlabeled_share=0.5, augmentation=MOVED, seed=3)
    (whole,) = drawn(data, 16, epochs=2)
    shares = drawn(data, 16, epochs=2, processes=processes)
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert sorted(batch.rows) == sorted(row for part in parts for row in part.rows)
        assert {len(part.targets) for part in parts} == {8 // processes}
        assert {len(part.rows) for part in parts} == {16 // processes}
        order, found = np.argsort(batch.rows), np.argsort(np.concatenate([part.rows for part in parts]))
        for position in range(2):
            inputs = torch.cat([part.inputs[position] for part in parts])
            assert torch.equal(inputs[found], batch.inputs[position][order])


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_rows_and_view_name_what_was_drawn(in_memory, share):
    labeled, unlabeled = numbered(12), numbered(36, 100)
    if not in_memory:
        labeled, unlabeled = OneByOne(labeled), OneByOne(unlabeled)
    data = TrainingData(labeled, unlabeled if share else None, unlabeled_share=share, augmentation=MOVED, seed=7)
    (batches,) = drawn(data, epochs=3)
    assert {view for batch in batches for view in batch.views} == set(range(6 if share else 3))
    for batch in batches:
        for found, named in zip(batch.inputs, data.view(data.inputs(batch.rows), batch.rows, batch.views), strict=True):
            assert torch.equal(found, named)


def test_sample_has_the_same_view_whatever_is_drawn_beside_it():
    data = TrainingData(numbered(12), augmentation=MOVED, seed=7)
    rows = np.array([9, 3, 5])
    together, alone = data.view(data.inputs(rows), rows, 2), data.view(data.inputs(rows[1:2]), rows[1:2], 2)
    assert torch.equal(together[0][1:2], alone[0])


def test_seed_of_the_data_chooses_the_views_and_the_seed_of_the_batches_the_order():
    rows = np.arange(12)
    first, other = (TrainingData(numbered(12), augmentation=MOVED, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.view(first.inputs(rows), rows, 0)[0], other.view(other.inputs(rows), rows, 0)[0])
    one, another = ([batch.rows.tolist() for batch in drawn(data, 4)[0]] for data in (first, other))
    assert one == another


def test_every_epoch_shows_another_view_unless_views_repeat():
    endless, repeating = (TrainingData(numbered(8), augmentation=MOVED, views=views) for views in (None, 2))
    assert [set(batch.views) for batch in drawn(endless, epochs=5)[0]] == [{0}, {1}, {2}, {3}, {4}]
    (batches,) = drawn(repeating, epochs=5)
    assert [set(batch.views) for batch in batches] == [{0}, {1}, {0}, {1}, {0}]
    shown = [batch.inputs[0][np.argsort(batch.rows)] for batch in batches]
    assert torch.equal(shown[0], shown[2])
    assert not torch.equal(shown[0], shown[1])


def test_without_augmentation_samples_are_shown_as_they_are():
    data = TrainingData(numbered(8))
    rows = np.array([3, 0])
    assert data.view(data.inputs(rows), rows, 5)[0].flatten().tolist() == [3.0, 0.0]


def test_inputs_of_rows_of_one_split_alone_are_found():
    data = semi_supervised()
    assert data.inputs(np.array([12, 47]))[0].flatten().tolist() == [100.0, 135.0]
    assert data.inputs(np.array([11, 0]))[0].flatten().tolist() == [11.0, 0.0]


def test_empty_split_is_refused():
    with pytest.raises(InputError, match="must have samples, got 0"):
        divide_batch(TrainingData(numbered(0)), 8, 1)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_share_that_leaves_one_split_out_is_refused(share):
    with pytest.raises(InputError, match=rf"share of {share} makes . of 8 unlabeled; .* larger batch_size"):
        divide_batch(semi_supervised(share=share), 8, 1)


@pytest.mark.parametrize(
    ("batch_size", "share", "parts"),
    [(7, 0.5, "7 samples, 4 of them unlabeled"), (8, 0.4, "8 samples, 3 of them unlabeled")],
)
def test_batch_that_does_not_divide_among_processes_is_refused(batch_size, share, parts):
    with pytest.raises(InputError, match=f"divide among 2 processes, got {parts}; choose another batch_size"):
        divide_batch(semi_supervised(share=share), batch_size, 2)


def test_sample_that_is_drawn_often_in_an_epoch_is_shown_in_another_view_each_time():
    data = TrainingData(numbered(4), numbered(28, 100), unlabeled_share=0.5, augmentation=MOVED)
    (batches,) = drawn(data, epochs=2)
    shown = [(row, view) for batch in batches for row, view in zip(batch.rows, batch.views, strict=True) if row < 4]
    assert len(shown) > 2 * 4
    assert len(set(shown)) == len(shown)


def test_unlabeled_tokens_with_the_ignored_target_do_not_count():
    labeled = Samples((torch.zeros(4, 3),), torch.tensor([[1, 2, -100]] * 4))
    unlabeled = Samples((torch.zeros(4, 3),), torch.tensor([[0, -100, -100]] * 4))
    for split, expected in ((unlabeled, [True, False, False]), (Samples(labeled.inputs, torch.zeros(4)), [True] * 3)):
        (batches,) = drawn(TrainingData(labeled, split, unlabeled_share=0.5))
        for batch in batches:
            count = len(batch.targets)
            assert (batch.counted[:count] == torch.tensor([True, True, False])).all()
            assert (batch.counted[count:] == torch.tensor(expected)).all()
