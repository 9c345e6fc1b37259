"""Stopping in good order: SIGTERM (a scheduler's notice) and Ctrl-C end a run after a checkpoint."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """The run was asked to stop, has saved, and can be continued by the same command."""


class StopRequest:
    """Listens for SIGTERM and SIGINT while it is open (in the main thread of a single process).

    In a run of several processes the coordination service hears SIGTERM, and all of them agree on the step to stop at.
    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
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

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; every process gets the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested
