"""Every sample once an epoch, the same batches on any number of GPUs, and from any position on."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.errors import DataError
from train.data.order import Order

data_sets = st.lists(st.integers(0, 4), min_size=1, max_size=60)
sizes = st.integers(1, 9)


@given(data_sets, sizes, st.integers(1, 5), st.integers(0, 2**63 - 1), st.integers(0, 99))
def test_each_sample_once_an_epoch_over_all_gpus(buckets, batch_size, world, seed, epoch):
    ranks = [list(Order(buckets, batch_size=batch_size, seed=seed, rank=rank, world=world).epoch(epoch)) for rank in range(world)]
    samples = [sample for batches in ranks for batch in batches for sample in batch.samples]
    assert sorted(samples) == list(range(len(buckets)))
    for step, parts in enumerate(zip(*ranks, strict=True)):  # all take the same steps
        assert {part.step for part in parts} == {step}
        whole = sum(len(part.samples) for part in parts)
        assert {part.whole for part in parts} == {whole}
        assert whole <= batch_size
        assert {buckets[sample] for part in parts for sample in part.samples} == {parts[0].bucket}
        assert max(len(part.samples) for part in parts) - min(len(part.samples) for part in parts) <= 1


@given(data_sets, sizes, st.integers(1, 4))
def test_a_steps_batch_does_not_depend_on_the_number_of_gpus(buckets, batch_size, world):
    alone = [sorted(batch.samples) for batch in Order(buckets, batch_size=batch_size, seed=3).epoch(7)]
    ranks = [Order(buckets, batch_size=batch_size, seed=3, rank=rank, world=world).epoch(7) for rank in range(world)]
    together = [sorted(itertools.chain(*(part.samples for part in parts))) for parts in zip(*ranks, strict=True)]
    assert together == alone


@given(data_sets, sizes, st.data())
def test_resumed_from_any_step(buckets, batch_size, data):
    order = Order(buckets, batch_size=batch_size, seed=1)
    position = data.draw(st.integers(0, order.steps_per_epoch))
    whole = list(itertools.islice(order.endless(), 2 * order.steps_per_epoch))
    again = list(itertools.islice(Order(buckets, batch_size=batch_size, seed=1).endless(0, position), len(whole) - position))
    assert again == whole[position:]


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        return [batch.samples for batch in Order([0] * 40, batch_size=4, seed=seed).epoch(number)]

    assert epoch(0, 0) != epoch(0, 1) != epoch(1, 1)
    assert epoch(0, 0) != epoch(1, 0)


@given(data_sets, st.integers(1, 4))
def test_short_batches_can_be_left_out(buckets, batch_size):
    full = sum(buckets.count(bucket) // batch_size for bucket in set(buckets))
    if full:
        batches = list(Order(buckets, batch_size=batch_size, seed=0, drop_short=True).epoch(0))
        assert [batch.whole for batch in batches] == [batch_size] * full
    else:
        with pytest.raises(DataError, match="not one batch of"):
            Order(buckets, batch_size=batch_size, seed=0, drop_short=True)


def test_bad_arguments():
    with pytest.raises(DataError, match="got 0 samples"):
        Order([], batch_size=1, seed=0)
    with pytest.raises(DataError, match="rank 2 of 2"):
        Order([0], batch_size=1, seed=0, rank=2, world=2)
    with pytest.raises(DataError, match="got 9 of an epoch of 1"):
        list(Order([0], batch_size=1, seed=0).epoch(0, 9))
