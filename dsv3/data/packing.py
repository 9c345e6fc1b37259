"""Best-fit packing of documents into rows (Ding et al. 2024, "Fewer Truncations Improve Language Modeling")."""

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: indices of `lengths` by bin, each index once, no bin over `capacity`.

    The longest item first, each into the fullest bin that still holds it. Bins wait in lists by the room they have
    left; bit r of the integer `rooms` says that list r is not empty, so the tightest fit is the lowest set bit from
    the item's length up: O(capacity / 64) words an item.
    """
    bins: list[list[int]] = []
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = int(lengths[index])
        assert 0 < length <= capacity, f"item {index} of length {length} does not fit a bin of {capacity}"
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        waiting[room - length].append(chosen)
        rooms |= 1 << (room - length)
    return bins


def pack(documents: Sequence[np.ndarray], row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_RL, segment_ids_RL), both int32, with all tokens of `documents` once and in order.

    Only a document longer than `row_length` is cut, into pieces of `row_length` and a rest; pieces are packed by
    `best_fit`. Each piece of a row is a segment 1, 2, ...; padding ends the row, with token 0 and segment id 0.
    """
    pieces = [document[start:start + row_length]
              for document in documents for start in range(0, len(document), row_length)]
    rows = best_fit([len(piece) for piece in pieces], row_length)
    tokens_RL = np.zeros((len(rows), row_length), np.int32)
    segment_ids_RL = np.zeros((len(rows), row_length), np.int32)
    for row, members in enumerate(rows):
        lengths = [len(pieces[index]) for index in members]
        tokens_RL[row, :sum(lengths)] = np.concatenate([pieces[index] for index in members])
        segment_ids_RL[row, :sum(lengths)] = np.repeat(np.arange(1, len(members) + 1), lengths)
    return tokens_RL, segment_ids_RL
