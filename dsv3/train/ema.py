"""Exponential moving average of the weights, kept on the host beside training (report section 3.2.3)."""

from concurrent.futures import Future, ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import EMAConfig


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

    def __enter__(self) -> "HostEMA":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()

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
        # New arrays, not in place: a checkpoint may still be writing the old ones.
        decay, rest = np.float32(self._config.decay), np.float32(1 - self._config.decay)
        return jax.tree.map(lambda old, new: decay * old + rest * np.asarray(new), average, copy)


def initial_average(params: chex.ArrayTree) -> chex.ArrayTree:
    """The average before any update: the weights themselves."""
    return jax.tree.map(np.array, jax.device_get(params))
