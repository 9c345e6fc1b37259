"""Exponential moving average of the weights, kept on the host beside training (report section 3.2.3).

The report gives no decay. Ours is corrected for its start, as Adam's moments are: the average is always one of weights
that training has reached, and the initial ones, which would dominate the first 1 / (1 - decay) updates, are not in it.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor

import chex
import jax
import numpy as np

from dsv3.config import EMAConfig

PIECE = 1 << 20
"""Elements that a worker blends at a time: 4 MB."""


class HostEMA:
    """Sum over updates n = 1..N of decay^(N - n) * weights, over the sum of these factors, in float32 NumPy.

    An update is due every `config.every` steps. `update` only starts a copy to pinned memory of the host, between two
    steps, and hands it to a thread, so the next step may start at once (and donate its buffers); if the update before
    is still under way, it waits for that one. Updates happen in order, so a run that was stopped and continued ends
    with the same average, bit for bit. Use as a context manager.
    """

    def __init__(self, config: EMAConfig, average: chex.ArrayTree) -> None:
        self._config = config
        self._average: Future[chex.ArrayTree] = Future()
        self._average.set_result(average)
        self._copy = jax.jit(lambda params: jax.device_put(params, jax.memory.Space.Host))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._workers = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="ema_worker")

    def __enter__(self) -> "HostEMA":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()
        self._workers.shutdown()

    def update(self, params: chex.ArrayTree, step: int) -> None:
        """Take the weights after `step` steps into account, if that step is due."""
        if step % self._config.every == 0:
            number = step // self._config.every
            self._average = self._thread.submit(self._blend, self.average(), self._copy(params), number)

    def average(self) -> chex.ArrayTree:
        """The average over all updates so far; waits for the one under way."""
        return self._average.result()

    def _blend(self, average: chex.ArrayTree, copy: chex.ArrayTree, number: int) -> chex.ArrayTree:
        """The average after update `number`, in pieces on all cores.

        A new tree, not in place: a checkpoint may still be writing the old one.
        """
        weights = jax.tree.map(np.asarray, copy)
        new = jax.tree.map(lambda old: np.empty(old.shape, np.float32), average)
        flat = [[leaf.reshape(-1) for leaf in jax.tree.leaves(tree)] for tree in (average, weights, new)]
        pieces = [(leaf, slice(start, start + PIECE)) for leaf, array in enumerate(flat[0])
                  for start in range(0, array.size, PIECE)]
        share = (1 - self._config.decay) / (1 - self._config.decay**number)  # 1 for the first
        decay, rest = np.float32(1 - share), np.float32(share)

        def blend(piece: tuple[int, slice]) -> None:
            old, weight, out = (arrays[piece[0]][piece[1]] for arrays in flat)
            np.multiply(old, decay, out=out)
            out += rest * weight

        list(self._workers.map(blend, pieces))
        return new


def initial_average(params: chex.ArrayTree) -> chex.ArrayTree:
    """The average before any update: the weights themselves. The first update replaces it."""
    return jax.tree.map(np.array, jax.device_get(params))
