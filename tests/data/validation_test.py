"""Validation windows: every token scored once, with the context its window promises, in static shapes."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dsv3.config import UserError
from dsv3.data.validation import bits_per_byte, windows

shapes = st.integers(1, 12).flatmap(
    lambda seq_len: st.tuples(st.just(seq_len), st.integers(1, seq_len), st.integers(1, 4)))


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.integers(2, 50), min_size=1, max_size=6), shapes)
def test_every_token_but_bos_is_scored_once_from_its_own_document(lengths, shape):
    seq_len, stride, batch_size = shape
    starts = np.cumsum([0, *lengths])
    documents = [np.arange(start, start + length) + 1 for start, length in zip(starts, lengths)]  # unique tokens
    scored = []
    for batch in windows(documents, *shape):
        assert all(field.shape == (batch_size, seq_len) for field in batch)
        assert [field.dtype for field in batch] == [np.int32, np.int32, np.float32, np.int32]
        assert set(np.unique(batch.weights_BT)) <= {0, 1} and set(np.unique(batch.segment_ids_BT)) <= {0, 1}
        real = batch.segment_ids_BT == 1
        assert np.all(batch.targets_BT[real] == batch.tokens_BT[real] + 1)
        assert np.all(batch.weights_BT[~real] == 0)
        assert np.all(np.diff(batch.segment_ids_BT, axis=1) <= 0)  # padding only at the end
        for row in range(batch_size):
            for t in np.flatnonzero(batch.weights_BT[row]):
                target = int(batch.targets_BT[row, t])
                document = documents[np.searchsorted(starts, target - 1, side="right") - 1]
                position = target - document[0]
                scored.append(target)
                assert t + 1 >= min(position, seq_len - stride + 1)  # inputs that the prediction sees
                assert np.all(np.isin(batch.tokens_BT[row, :t + 1], document))
    assert sorted(scored) == sorted(token for document in documents for token in document[1:].tolist())


def test_windows_by_hand():
    (batch,) = windows([np.arange(8)], seq_len=4, stride=2, batch_size=3)
    np.testing.assert_array_equal(batch.tokens_BT, [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 0]])
    np.testing.assert_array_equal(batch.targets_BT, [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 0]])
    np.testing.assert_array_equal(batch.weights_BT, [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]])
    np.testing.assert_array_equal(batch.segment_ids_BT, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])


def test_last_batch_is_filled_with_empty_rows():
    batches = list(windows([np.arange(5), np.arange(3)], seq_len=4, stride=4, batch_size=4))
    assert len(batches) == 1
    np.testing.assert_array_equal(batches[0].segment_ids_BT.sum(1), [4, 2, 0, 0])
    np.testing.assert_array_equal(batches[0].weights_BT.sum(1), [4, 2, 0, 0])


@pytest.mark.parametrize("stride", [0, 5])
def test_a_stride_that_skips_tokens_is_refused(stride):
    with pytest.raises(UserError, match=f"data.eval_stride {stride} is not between 1 and the 4"):
        list(windows([np.arange(8)], seq_len=4, stride=stride, batch_size=1))


def test_a_uniform_byte_model_costs_eight_bits_a_byte():
    assert math.isclose(bits_per_byte(1000 * math.log(256), 1000), 8)
