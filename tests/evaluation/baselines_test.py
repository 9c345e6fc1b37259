"""Baselines: the bigram against a dictionary of counts, and the known cost of simple texts."""

import collections
import math

import numpy as np
import pytest

from dsv3.evaluation.baselines import bigram_bits, bigram_probability, fit_bigram, xz_bits

V = 6


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    segment_ids_RL = np.sort(rng.integers(0, 3, (9, 8)), axis=1)[:, ::-1].astype(np.uint16)  # padding at the end
    tokens_RL = np.where(segment_ids_RL > 0, rng.integers(0, V - 1, (9, 8)), 0).astype(np.uint16)  # V - 1 is never seen
    return tokens_RL, segment_ids_RL


def slow_probability(tokens_RL, segment_ids_RL, first, second):
    """The formula of the docstring, one pair at a time."""
    pairs = [(int(row[t]), int(row[t + 1])) for row, segments in zip(tokens_RL, segment_ids_RL)
             for t in range(len(row) - 1) if segments[t] and segments[t + 1]]
    count = collections.Counter(pairs)
    n1, n2 = (sum(c == n for c in count.values()) for n in (1, 2))
    discount = n1 / (n1 + 2 * n2)
    unigram = (sum(w == second for _, w in pairs) + 1) / (len(pairs) + V)
    total = sum(v == first for v, _ in pairs)
    if total == 0:
        return unigram
    types = len({w for v, w in pairs if v == first})
    return max(count[first, second] - discount, 0) / total + discount * types / total * unigram


def test_probabilities_match_brute_force_and_sum_to_one(rows):
    bigram = fit_bigram([rows], V)
    assert 0 < bigram.discount < 1
    first, second = np.divmod(np.arange(V * V), V)
    probability = bigram_probability(bigram, first, second).reshape(V, V)
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-12)
    assert np.all(probability > 0)
    expected = [[slow_probability(*rows, v, w) for w in range(V)] for v in range(V)]
    np.testing.assert_allclose(probability, expected, rtol=1e-12)


def test_shards_count_as_their_rows_together(rows):
    tokens_RL, segment_ids_RL = rows
    whole = fit_bigram([rows], V)
    for cuts in ([4], [1, 1, 7], [0, 9]):
        parts = fit_bigram(zip(np.split(tokens_RL, cuts), np.split(segment_ids_RL, cuts)), V)
        for one, other in zip(whole, parts):
            np.testing.assert_array_equal(one, other)


def test_pairs_never_cross_rows_or_touch_padding():
    bigram = fit_bigram([(np.array([[1, 2, 0], [3, 4, 3]]), np.array([[1, 1, 0], [1, 2, 2]]))], V)
    assert set(zip(*(array.tolist() for array in np.divmod(bigram.pairs, V)))) == {(1, 2), (3, 4), (4, 3)}


def test_no_rare_pairs_still_leave_mass_for_the_unseen():
    bigram = fit_bigram([(np.array([[1, 2, 1, 2, 1]] * 3), np.ones((3, 5), int))], V)  # every pair is seen six times
    probability = bigram_probability(bigram, np.full(V, 1), np.arange(V))
    assert np.all(probability > 0) and math.isclose(probability.sum(), 1)


def test_bits_count_every_token_but_bos_over_raw_bytes(rows):
    documents = [(np.array([0, 3, 2, 1]), 7), (np.array([0, 5, 1]), 4)]
    pairs = [(0, 3), (3, 2), (2, 1), (0, 5), (5, 1)]
    expected = -sum(math.log2(slow_probability(*rows, v, w)) for v, w in pairs) / 11
    assert math.isclose(bigram_bits([rows], documents, V), expected)


def test_a_fair_coin_costs_one_bit_a_token():
    tokens_RL = np.random.default_rng(0).integers(0, 2, (200, 101))
    bits = bigram_bits([(tokens_RL[:100], np.ones((100, 101), int))], [(tokens_RL[100:].reshape(-1), 10_100)], 2)
    assert abs(bits - 1) < 0.002


def test_xz_knows_noise_from_repetition():
    noise = np.random.default_rng(0).bytes(20_000)
    assert 8 <= xz_bits(noise) < 8.1
    assert xz_bits(b"repetition " * 2000) < 0.1
    with pytest.raises(AssertionError):
        xz_bits(b"")
