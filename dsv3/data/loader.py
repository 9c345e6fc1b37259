"""Endless shuffled micro-batches from packed rows, resumable at any batch."""

from collections.abc import Iterator

import grain
import numpy as np

from dsv3.config import DataConfig, require
from dsv3.data.prepare import Prepared
from dsv3.model.batch import Batch


class _Rows:
    """Random access to the packed rows, as grain wants its sources."""

    def __init__(self, tokens_RL: np.ndarray, segment_ids_RL: np.ndarray) -> None:
        self._tokens_RL, self._segment_ids_RL = tokens_RL, segment_ids_RL

    def __len__(self) -> int:
        return len(self._tokens_RL)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._tokens_RL[index], self._segment_ids_RL[index]


def row_to_example(tokens_L: np.ndarray, segment_ids_L: np.ndarray, segment_ids: bool) -> Batch:
    """A packed row of T+1 tokens as T predictions (the fields of `Batch`, without their axis B).

    With `segment_ids` a document sees and predicts only itself: a target in another segment than its input has weight
    0. Without (the report's pre-training) all tokens of the row are one segment 1 and predictions across documents
    count. Padding has segment id 0, and a target that is padding weight 0, either way.
    """
    inputs, targets = segment_ids_L[:-1], segment_ids_L[1:]
    counts = targets != 0
    if segment_ids:
        counts &= targets == inputs
    return Batch(
        tokens_BT=tokens_L[:-1].astype(np.int32),
        targets_BT=tokens_L[1:].astype(np.int32),
        weights_BT=counts.astype(np.float32),
        segment_ids_BT=(inputs if segment_ids else inputs != 0).astype(np.int32),
    )


def train_loader(
    prepared: Prepared, config: DataConfig, rows: int, *, consumed: int = 0, process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Temporary."""
    n_rows = len(prepared.tokens_RL)
    local = rows // process_count
    dataset = (
        grain.MapDataset.source(_Rows(prepared.tokens_RL, prepared.segment_ids_RL))
        .seed(config.seed)
        .shuffle()
        .repeat()
        .map(lambda row: row_to_example(*row, config.segment_ids))
        .batch(local)
    )
    for n in range(consumed // local + process_index, 10**9, process_count):
        yield dataset[n]
