"""Loader: the weights of both segment rules, epochs, and exact resumption."""

import itertools
import json

import jax
import numpy as np
import pytest

from dsv3.config import UserError
from dsv3.data.loader import row_to_example, train_loader
from dsv3.data.prepare import Prepared
from dsv3.model.batch import Batch


def rows(n, length=5):
    """Prepared data whose every row is recognised by its first token."""
    tokens_RL = (np.arange(n)[:, None] * 10 + np.arange(length)).astype(np.uint16)
    return Prepared(None, tokens_RL, np.ones_like(tokens_RL), [], b"", {})


def take(iterator, n):
    return [batch.tokens_BT[:, 0].tolist() for batch in itertools.islice(iterator, n)]


def test_a_row_by_hand():
    tokens = np.array([7, 8, 9, 7, 8, 0], np.uint16)
    segments = np.array([1, 1, 1, 2, 2, 0], np.uint16)
    apart = row_to_example(tokens, segments, segment_ids=True)
    joined = row_to_example(tokens, segments, segment_ids=False)
    for example in (apart, joined):
        assert [field.dtype for field in example] == [np.int32, np.int32, np.float32, np.int32]
        np.testing.assert_array_equal(example.tokens_BT, [7, 8, 9, 7, 8])
        np.testing.assert_array_equal(example.targets_BT, [8, 9, 7, 8, 0])
    np.testing.assert_array_equal(apart.weights_BT, [1, 1, 0, 1, 0])
    np.testing.assert_array_equal(apart.segment_ids_BT, [1, 1, 1, 2, 2])
    np.testing.assert_array_equal(joined.weights_BT, [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(joined.segment_ids_BT, [1, 1, 1, 1, 1])
    padded = row_to_example(np.array([7, 0, 0]), np.array([1, 0, 0]), segment_ids=False)
    np.testing.assert_array_equal(padded.segment_ids_BT, [1, 0])


def test_batches_are_pytrees_of_the_micro_batch():
    batch = next(train_loader(rows(6), 2, 0, False))
    assert isinstance(batch, Batch)
    assert [leaf.shape for leaf in jax.tree.leaves(batch)] == [(2, 4)] * 4


def test_every_epoch_has_every_row_once_in_a_new_order():
    seen = list(itertools.chain(*take(train_loader(rows(10), 2, 0, False), 15)))
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch) == list(range(0, 100, 10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert seen[:10] != list(range(0, 100, 10))


def test_batches_cross_epochs_without_losing_rows():
    seen = list(itertools.chain(*take(train_loader(rows(7), 3, 0, False), 7)))
    assert all(sorted(seen[at:at + 7]) == list(range(0, 70, 10)) for at in (0, 7, 14))


def test_the_seed_decides_the_order():
    assert take(train_loader(rows(20), 4, 1, False), 8) == take(train_loader(rows(20), 4, 1, False), 8)
    assert take(train_loader(rows(20), 4, 1, False), 5) != take(train_loader(rows(20), 4, 2, False), 5)


@pytest.mark.parametrize("k", [0, 1, 3, 4, 11, 50])  # an epoch is 3.5 batches; 50 is far beyond the read-ahead
def test_state_resumes_with_the_very_next_batch(k):
    straight = take(train_loader(rows(7), 2, 5, False), k + 10)
    running = train_loader(rows(7), 2, 5, False)
    assert take(running, k) == straight[:k]
    state = json.loads(json.dumps(running.get_state()))
    assert take(running, 4) == straight[k:k + 4]  # the threads have read ahead; the state must not know
    fresh = train_loader(rows(7), 2, 5, False)
    fresh.set_state(state)
    assert take(fresh, 10) == straight[k:]
    fresh.set_state(state)
    assert take(fresh, 10) == straight[k:]


def test_too_few_rows_and_bad_seeds_are_refused():
    with pytest.raises(UserError, match="packs into 3 rows, fewer than train.micro_batch_size 4"):
        train_loader(rows(3), 4, 0, False)
    with pytest.raises(UserError, match="data seed is -1"):
        train_loader(rows(3), 1, -1, False)
