"""Endless shuffled batches from packed rows: a function of the number of rows consumed, and of nothing else."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from dsv3.config import DataConfig, require
from dsv3.data.prefetch import prefetch
from dsv3.data.prepare import Prepared, Shard
from dsv3.model.batch import Batch

PERIOD = 2**16
"""Rows after which the order of the sources repeats, nearly: shares are multiples of one over it."""
BATCHES_AHEAD = 4


def predictions(tokens_BL: np.ndarray, segment_ids_BL: np.ndarray, segment_ids: bool) -> Batch:
    """Packed rows of L = T + 1 tokens as T predictions each.

    With `segment_ids` a document sees and predicts only itself: a target in another segment than its input has weight
    0. Without (the report's pre-training) all tokens of the row are one segment 1 and predictions across documents
    count. Padding has segment id 0, and a target that is padding weight 0, either way.
    """
    inputs, targets = segment_ids_BL[:, :-1], segment_ids_BL[:, 1:]
    counts = targets != 0
    if segment_ids:
        counts &= targets == inputs
    return Batch(
        tokens_BT=tokens_BL[:, :-1].astype(np.int32),
        targets_BT=tokens_BL[:, 1:].astype(np.int32),
        weights_BT=counts.astype(np.float32),
        segment_ids_BT=(inputs if segment_ids else inputs != 0).astype(np.int32),
    )


class Mixture:
    """Which row of which source stands at each place of the stream: random access to an interleaving by `weights`.

    The n-th row of a source with share w is due at (n + 1/2) / w; rows follow in the order in which they are due. So
    among any k rows of the stream in succession, k w of S sources' rows are that source's, give or take 1 + S w.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights) / np.sum(weights)
        self._counts_S = np.maximum(np.round(shares * PERIOD), 1).astype(np.int64)
        sources = np.repeat(np.arange(len(weights)), self._counts_S)
        places = np.concatenate([np.arange(count) for count in self._counts_S])
        order = np.argsort((places + 0.5) / self._counts_S[sources], kind="stable")
        self._sources, self._places = sources[order], places[order]

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of its rows before) of the rows at `positions` of the stream."""
        periods, within = np.divmod(positions, len(self._sources))
        sources = self._sources[within]
        return sources, periods * self._counts_S[sources] + self._places[within]


class Rows:
    """The rows of one source, in an order of its own every epoch, over and over."""

    def __init__(self, shards: Sequence[Shard], seed: Sequence[int]) -> None:
        self._shards, self._seed = shards, list(seed)
        self._ends = np.cumsum([len(shard.tokens_RL) for shard in shards])
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)  # a batch may touch two epochs

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([*self._seed, epoch]).permutation(self._ends[-1])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_L, segment_ids_L) of the `index`-th row, counted through all epochs."""
        epoch, within = divmod(int(index), int(self._ends[-1]))
        row = self._order(epoch)[within]
        shard = np.searchsorted(self._ends, row, side="right")
        return tuple(array[row - self._ends[shard]] for array in self._shards[shard])  # negative: counted from its end


def train_loader(prepared: Prepared, config: DataConfig, rows: int, *, consumed: int = 0, process_index: int = 0,
                 process_count: int = 1) -> Iterator[Batch]:
    """Batches without end. The n-th holds rows `consumed + n rows` and on of one stream, divided among processes:

        consumed + n rows + [p rows / P, (p + 1) rows / P)        for p = process_index, P = process_count

    The stream depends only on the prepared rows, `config.seed` and the weights of `config.sources`. Each source comes
    in a new order every epoch; `Mixture` interleaves them. There is no state to save but the number of rows consumed,
    and starting at any is instant. Threads read ahead (`prefetch`).

    Raises `UserError` when `rows` cannot be divided among the processes, or `consumed` is negative.
    """
    require(rows > 0 and rows % process_count == 0,
            f"a batch of {rows} rows cannot be divided evenly among {process_count} processes; change the batch size")
    require(consumed >= 0, f"the data starts after {consumed} consumed rows; expected 0 or more")
    assert 0 <= process_index < process_count, f"process {process_index} of {process_count}"
    assert len(prepared.sources) == len(config.sources), "prepared from other sources"
    mixture = Mixture([source.weight for source in config.sources])
    sources = [Rows(shards, (config.seed, number)) for number, shards in enumerate(prepared.sources)]
    share = rows // process_count

    def batch(n: int) -> Batch:
        positions = consumed + n * rows + process_index * share + np.arange(share)
        read = [sources[source].read(index) for source, index in zip(*mixture(positions))]
        return predictions(*map(np.stack, zip(*read)), config.segment_ids)

    return prefetch(batch, itertools.count(), threads=2, ahead=BATCHES_AHEAD)
