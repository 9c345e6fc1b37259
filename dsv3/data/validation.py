"""Validation text as overlapping windows, and the unit in which it is scored."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dsv3.config import require
from dsv3.model.batch import Batch


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """`nats / ln 2 / n_bytes`: the code length of all scored tokens, eos included, over the bytes of the raw text."""
    return nats / math.log(2) / n_bytes


def _spans(n_targets: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored, end) of each window over the targets of one document."""
    scored = 0
    for start in range(0, n_targets, stride):
        end = min(start + seq_len, n_targets)
        yield start, scored, end
        scored = end
        if end == n_targets:
            return


def _rows(documents_tokens: Sequence[np.ndarray], seq_len: int, stride: int) -> Iterator[Batch]:
    for tokens in documents_tokens:
        for start, scored, end in _spans(len(tokens) - 1, seq_len, stride):
            length = end - start
            row = Batch(np.zeros(seq_len, np.int32), np.zeros(seq_len, np.int32),
                        np.zeros(seq_len, np.float32), np.zeros(seq_len, np.int32))
            row.tokens_BT[:length] = tokens[start:end]
            row.targets_BT[:length] = tokens[start + 1:end + 1]
            row.weights_BT[scored - start:length] = 1
            row.segment_ids_BT[:length] = 1
            yield row


def windows(documents_tokens: Sequence[np.ndarray], seq_len: int, stride: int, batch_size: int) -> Iterator[Batch]:
    """Batches of `batch_size` windows of `seq_len` inputs, each document by itself, advancing by `stride`.

    Every token of a document but the first (bos) has weight 1 in exactly one window: in the first window all targets
    count, in a later one those that no earlier window reached, so with at least `seq_len - stride` tokens of context.
    Windows are padded at the end and the last batch with empty rows (segment id 0, weight 0): one static shape.

    Raises `UserError` when `stride` is not in 1..seq_len, which would leave tokens unscored.
    """
    require(0 < stride <= seq_len, f"data.eval_stride {stride} is not between 1 and the {seq_len} tokens of a window; "
            "tokens between windows would not be scored")
    pending: list[Batch] = []
    for row in _rows(documents_tokens, seq_len, stride):
        pending.append(row)
        if len(pending) == batch_size:
            yield _stack(pending)
            pending = []
    if pending:
        empty = Batch(*map(np.zeros_like, pending[0]))
        yield _stack(pending + [empty] * (batch_size - len(pending)))


def _stack(rows: list[Batch]) -> Batch:
    return Batch(*map(np.stack, zip(*rows)))
