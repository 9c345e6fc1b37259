"""Stopping in good order: SIGTERM (a scheduler's notice) and Ctrl-C end a run after a checkpoint."""

import signal
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3.parallel.mesh import DATA, place_global


class Stopped(Exception):
    """The run was asked to stop, has saved, and can be continued by the same command."""


class StopRequest:
    """Listens for SIGTERM and SIGINT while it is open (in the main thread). A second signal ends the process at once.

    A scheduler may signal one process of a job, or all of them at different steps. So after every step the processes
    add up their flags on the devices, and act on the sum of the step before: it is ready by then, nobody waits for it,
    and all of them see the same one.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._requested = mesh, False
        self._sum_before: jax.Array | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._sum = jax.jit(partial(jax.shard_map, mesh=mesh, in_specs=P(DATA), out_specs=P())(
            lambda flags: jax.lax.psum(jnp.sum(flags), DATA)))

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self._requested = True
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def reached(self) -> bool:
        """Whether to stop now; called once after every step, and every process gets the same answer."""
        if jax.process_count() == 1:
            return self._requested
        before = self._sum_before is not None and int(self._sum_before) > 0
        flags = np.full(self._mesh.size, self._requested, np.int32)
        self._sum_before = self._sum(place_global(self._mesh, flags, P(DATA)))
        return before
