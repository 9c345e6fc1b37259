"""What a trained model has to beat on the validation text: a smoothed bigram, and xz."""

import lzma
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dsv3.data.validation import bits_per_byte


class Bigram(NamedTuple):
    """Counts of an interpolated bigram. `pairs` are sorted keys `first * V + second`, `counts` how often each occurs.

    seen_V   occurrences of each token as the first of a pair
    types_V  different tokens that follow it
    unigram_V  probability of each token as the second of a pair, (count + 1) / (all + V)
    """

    pairs: np.ndarray
    counts: np.ndarray
    seen_V: np.ndarray
    types_V: np.ndarray
    unigram_V: np.ndarray
    discount: float


def count_pairs(shards: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(sorted keys `first * V + second`, how often each occurs) of neighbours in the rows of all shards."""
    pairs, counts = np.zeros((2, 0), np.int64)
    for tokens_RL, segment_ids_RL in shards:
        real = segment_ids_RL[:, 1:] != 0
        first, second = tokens_RL[:, :-1][real].astype(np.int64), tokens_RL[:, 1:][real]
        found, found_counts = np.unique(first * vocab_size + second, return_counts=True)
        pairs, places = np.unique(np.concatenate([pairs, found]), return_inverse=True)
        counts = np.bincount(places, np.concatenate([counts, found_counts])).astype(np.int64)
    return pairs, counts


def fit_bigram(shards: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> Bigram:
    """Count the pairs of neighbours within each packed row of `(tokens_RL, segment_ids_RL)`, padding excluded.

    Pairs across two documents of a row and FIM documents are included: the model trains on them too. The discount is
    n1 / (n1 + 2 n2), with n1 and n2 the numbers of pairs seen once and twice (0.5 when none was seen once).
    """
    pairs, counts = count_pairs(shards, vocab_size)
    first, second = np.divmod(pairs, vocab_size)
    seen_V, next_V = (np.bincount(tokens, counts, vocab_size).astype(np.int64) for tokens in (first, second))
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    return Bigram(
        pairs=pairs,
        counts=counts,
        seen_V=seen_V,
        types_V=np.bincount(first, minlength=vocab_size),
        unigram_V=(next_V + 1) / (np.sum(next_V) + vocab_size),
        discount=float(once / (once + 2 * twice)) if once else 0.5,
    )


def bigram_probability(bigram: Bigram, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """P(second | first) by absolute discounting, interpolated with the unigram; arrays of tokens of one shape.

        P(w | v) = max(c(v, w) - d, 0) / c(v) + d types(v) / c(v) P(w)        P(w | v) = P(w) where c(v) = 0
    """
    keys = first.astype(np.int64) * len(bigram.unigram_V) + second
    places = np.minimum(np.searchsorted(bigram.pairs, keys), len(bigram.pairs) - 1)
    counts = np.where(bigram.pairs[places] == keys, bigram.counts[places], 0)
    seen = np.maximum(bigram.seen_V[first], 1)
    backoff = np.where(bigram.seen_V[first] == 0, 1, bigram.discount * bigram.types_V[first] / seen)
    return np.maximum(counts - bigram.discount, 0) / seen + backoff * bigram.unigram_V[second]


def bigram_bits(shards: Iterable[tuple[np.ndarray, np.ndarray]],
                validation_documents: Sequence[tuple[np.ndarray, int]], vocab_size: int) -> float:
    """Bits per raw byte of a `Bigram` of the training rows on `(tokens, bytes)` documents.

    It scores the tokens that the model is scored on: all of a document but the leading bos.
    """
    bigram = fit_bigram(shards, vocab_size)
    nats = -sum(float(np.sum(np.log(bigram_probability(bigram, tokens[:-1], tokens[1:]))))
                for tokens, _ in validation_documents)
    return bits_per_byte(nats, sum(n_bytes for _, n_bytes in validation_documents))


def xz_bits(text: bytes) -> float:
    """Bits per byte of `text` compressed alone by xz -9e, container included; it has seen no training text."""
    assert text, "no validation text"
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
