"""Packing: nothing lost, nothing cut without need, and as tight as best-fit-decreasing by its definition."""

import itertools
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dsv3.data.packing import best_fit, pack

items = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity)))


def naive_best_fit_loads(lengths, capacity):
    """Best-fit-decreasing by its definition: scan all bins for the fullest that holds the item."""
    loads = []
    for length in sorted(lengths, reverse=True):
        fitting = [load for load in loads if load + length <= capacity]
        if fitting:
            loads.remove(max(fitting))
        loads.append(length + max(fitting, default=0))
    return sorted(loads)


def optimal_bins(lengths, capacity):
    """The fewest bins, by trying every assignment."""
    for n in itertools.count(min(len(lengths), 1)):
        for choice in itertools.product(range(n), repeat=len(lengths)):
            if all(sum(length for length, at in zip(lengths, choice) if at == b) <= capacity for b in range(n)):
                return n


@hypothesis.settings(deadline=None)
@hypothesis.given(items)
def test_every_item_once_within_capacity_and_equal_to_the_definition(case):
    lengths, capacity = case
    bins = best_fit(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    loads = sorted(sum(lengths[index] for index in members) for members in bins)
    assert all(0 < load <= capacity for load in loads)
    assert loads == naive_best_fit_loads(lengths, capacity)
    assert len(bins) <= 2 * sum(lengths) / capacity + 1  # at most one bin is no more than half full


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.lists(st.integers(1, 10), max_size=6))
def test_close_to_the_optimum(lengths):
    assert len(best_fit(lengths, 10)) <= 11 / 9 * optimal_bins(lengths, 10) + 6 / 9  # Johnson 1974; Dósa 2007


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 20))
def test_tokens_once_in_order_and_cut_only_where_unavoidable(lengths, row_length):
    ends = np.cumsum(lengths)
    documents = [np.arange(end - length, end) + 1 for length, end in zip(lengths, ends)]  # every token unique
    tokens_RL, segment_ids_RL = pack(documents, row_length)
    assert tokens_RL.dtype == segment_ids_RL.dtype == np.int32
    assert tokens_RL.shape == segment_ids_RL.shape == (len(tokens_RL), row_length)
    assert sorted(tokens_RL[segment_ids_RL > 0]) == list(range(1, ends[-1] + 1))
    assert np.all(tokens_RL[segment_ids_RL == 0] == 0)
    pieces = []
    for tokens, segment_ids in zip(tokens_RL, segment_ids_RL):
        n_real = np.count_nonzero(segment_ids)
        assert n_real > 0 and np.all(segment_ids[n_real:] == 0)  # padding only at the end
        assert set(segment_ids[:n_real]) == set(range(1, segment_ids.max() + 1))
        assert np.all(np.diff(segment_ids[:n_real]) >= 0)
        pieces += [tokens[segment_ids == segment].tolist() for segment in range(1, segment_ids.max() + 1)]
    expected = [document[at:at + row_length].tolist()
                for document in documents for at in range(0, len(document), row_length)]
    assert sorted(pieces) == sorted(expected)


def test_an_item_over_capacity_is_our_bug():
    with pytest.raises(AssertionError, match="length 11 does not fit"):
        best_fit([3, 11], 10)


def test_a_hundred_thousand_pieces_in_seconds():
    lengths = np.random.default_rng(0).integers(1, 4098, 100_000)
    start = time.process_time()
    bins = best_fit(lengths, 4097)
    assert time.process_time() - start < 3  # 0.15 s where it was written; a scan of all bins takes minutes
    assert len(bins) < 1.01 * lengths.sum() / 4097
