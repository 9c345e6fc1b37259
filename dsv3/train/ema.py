"""Exponential moving average of the weights, kept on the host beside training (report section 3.2.3)."""

import os
from concurrent.futures import Future, ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import EMAConfig

PIECE = 1 << 20
"""Elements that a worker blends at a time: 4 MB."""


class HostEMA:
    """decay * average + (1 - decay) * weights, every `config.every` steps, in float32 NumPy. Use as a context manager.

    `update` only starts a copy on the device and hands it to a thread, so the step goes on (and may donate its
    buffers); if the update before is still under way, it waits for that one. Updates happen in order, one for each
    step that is due, so a run that was stopped and continued ends with the same average, bit for bit.
    """

    def __init__(self, config: EMAConfig, average: chex.ArrayTree) -> None:
        self._config = config
        self._average: Future[chex.ArrayTree] = Future()
        self._average.set_result(average)
        self._copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params))
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
            average, copy = self.average(), self._copy(params)
            jax.tree.map(lambda leaf: leaf.copy_to_host_async(), copy)
            self._average = self._thread.submit(self._blend, average, copy)

    def average(self) -> chex.ArrayTree:
        """The average over all updates so far; waits for the one under way."""
        return self._average.result()

    def _blend(self, average: chex.ArrayTree, copy: chex.ArrayTree) -> chex.ArrayTree:
        """A new tree, not in place (a checkpoint may still be writing the old one), in pieces on all cores."""
        weights = jax.tree.map(np.asarray, copy)
        new = jax.tree.map(lambda old: np.empty(old.shape, np.float32), average)
        flat = [[leaf.reshape(-1) for leaf in jax.tree.leaves(tree)] for tree in (average, weights, new)]
        pieces = [(leaf, slice(start, start + PIECE)) for leaf, array in enumerate(flat[0])
                  for start in range(0, array.size, PIECE)]
        decay, rest = np.float32(self._config.decay), np.float32(1 - self._config.decay)

        def blend(piece: tuple[int, slice]) -> None:
            old, weight, out = (arrays[piece[0]][piece[1]] for arrays in flat)
            np.multiply(old, decay, out=out)
            out += rest * weight

        list(self._workers.map(blend, pieces))
        return new


def initial_average(params: chex.ArrayTree) -> chex.ArrayTree:
    """The average before any update: the weights themselves."""
    return jax.tree.map(np.array, jax.device_get(params))
