"""Splitting some of the tokens that join punctuation and a line break (report section 4.1).

A prompt often ends where such a token would have gone on ("):" without the line break). A model that has only seen the
joined token finds that end unlikely; splitting a random share of them in training reduces this bias.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from dsv3.data.tokenizer import Tokenizer


class Splits(NamedTuple):
    """Which tokens are split, and into what: token v becomes `parts[start_V[v]:start_V[v] + length_V[v]]`.

    `length_V` is 0 for tokens that are never split.
    """

    start_V: np.ndarray
    length_V: np.ndarray
    parts: np.ndarray


def joins(text: bytes) -> tuple[str, str] | None:
    """(punctuation, from the first line break on) of a token that joins them, else None.

    Before the line break there is punctuation, perhaps with spaces, and no letter and no number.
    """
    breaks = [place for place in (text.find(b"\n"), text.find(b"\r")) if place >= 0]
    if not breaks:
        return None
    try:
        before, after = text[:min(breaks)].decode(), text[min(breaks):].decode()
    except UnicodeDecodeError:  # a part of a character has no tokens of its own
        return None
    joined = before.strip() and not any(character.isalnum() for character in before)
    return (before, after) if joined else None


def find_splits(tokenizer: Tokenizer) -> Splits:
    """Each token that `joins` two parts, with the tokens of the two, each encoded by itself."""
    pairs = {id: pair for id, text in tokenizer.pieces() if (pair := joins(text)) is not None}
    encoded = tokenizer.encode_batch([part for pair in pairs.values() for part in pair])
    lengths = np.array([len(tokens) for tokens in encoded], np.int64).reshape(-1, 2).sum(axis=1)
    start_V, length_V = np.zeros((2, tokenizer.vocab_size), np.int64)
    length_V[list(pairs)] = lengths
    start_V[list(pairs)] = np.cumsum(lengths) - lengths
    return Splits(start_V, length_V, np.concatenate([np.zeros(0, np.int32), *encoded]))


def split_tokens(splits: Splits, tokens: np.ndarray, rate: float, seed: int, digest: bytes) -> np.ndarray:
    """`tokens` (int32) with each token that can be split split with probability `rate`; it decodes to the same text.

    The draws depend only on `seed` and the document's `text_digest`.
    """
    candidates = np.flatnonzero(splits.length_V[tokens])
    if rate == 0 or len(candidates) == 0:
        return tokens
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"split {seed} ".encode() + digest).digest(), "big"))
    chosen = candidates[rng.random(len(candidates)) < rate]
    length = splits.length_V[tokens[chosen]]
    repeats = np.ones(len(tokens), np.int64)
    repeats[chosen] = length
    result = np.repeat(tokens, repeats)
    ends = np.cumsum(repeats)[chosen]
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)  # 0, 1, .. in each split token
    result[np.repeat(ends - length, length) + within] = splits.parts[
        np.repeat(splits.start_V[tokens[chosen]], length) + within]
    return result
