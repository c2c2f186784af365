"""Full batches of one bucket, every sample once a pass, the same line of batches on any number of GPUs and from any position on."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.errors import DataError
from train.data.order import Order

data_sets = st.lists(st.integers(0, 4), min_size=1, max_size=60)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**63 - 1)


@given(data_sets, sizes, seeds, st.integers(1, 6))
def test_every_sample_once_a_pass(buckets, batch_size, seed, num_epochs):
    order = Order(buckets, batch_size=batch_size, seed=seed)
    batches = [batch for epoch in range(num_epochs) for batch in order.epoch(epoch)]
    assert [batch.number for batch in batches] == list(range(order.num_before(num_epochs)))
    seen = Counter()
    for batch in batches:
        assert len(batch.samples) == len(batch.passes) == batch_size
        assert {buckets[sample] for sample in batch.samples} == {batch.bucket}
        seen.update(zip(batch.samples, batch.passes, strict=True))
    assert max(seen.values(), default=1) == 1
    for bucket in set(buckets):
        members = [sample for sample, its in enumerate(buckets) if its == bucket]
        taken = num_epochs * len(members) // batch_size * batch_size
        whole_passes = taken // len(members)
        assert all(seen[sample, number] for sample in members for number in range(whole_passes))
        assert sum(seen[sample, whole_passes] for sample in members) == taken % len(members)
        assert num_epochs * len(members) - taken < batch_size  # what waits for the next epoch


@pytest.mark.slow
@given(data_sets, sizes, seeds, st.integers(1, 4), st.integers(0, 50))
def test_gpus_take_turns_in_one_line(buckets, batch_size, seed, world, start):
    order = Order(buckets, batch_size=batch_size, seed=seed)
    alone = list(itertools.islice(order.batches(), start + 12 * world))
    assert [batch.number for batch in alone] == list(range(len(alone)))
    shares = [list(itertools.islice(order.batches(start, rank=rank, world=world), 12)) for rank in range(world)]
    assert [batch for turn in zip(*shares, strict=True) for batch in turn] == alone[start:]


@given(data_sets, sizes, st.integers(0, 10**6))
def test_the_epoch_of_a_batch(buckets, batch_size, number):
    order = Order(buckets, batch_size=batch_size, seed=0)
    epoch = order.epoch_of(number)
    assert order.num_before(epoch) <= number < order.num_before(epoch + 1)


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        return [batch.samples for batch in Order([0] * 40, batch_size=4, seed=seed).epoch(number)]

    assert epoch(0, 0) == epoch(0, 0)
    assert len({str(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9


def test_buckets_are_mixed():
    batches = Order([0] * 50 + [1] * 50, batch_size=5, seed=0).epoch(0)
    changes = sum(a.bucket != b.bucket for a, b in itertools.pairwise(batches))
    assert changes > 4


def test_bad_arguments():
    with pytest.raises(DataError, match="got 0 samples"):
        Order([], batch_size=1, seed=0)
    with pytest.raises(DataError, match="batches of 0"):
        Order([0], batch_size=0, seed=0)
    for arguments in ({"start": -1}, {"rank": 2, "world": 2}, {"rank": -1}):
        with pytest.raises(DataError, match="expected 0 or more, and a rank below"):
            Order([0], batch_size=1, seed=0).batches(**arguments)
