"""Noticing loss spikes: the report had none that could not be recovered from (section 1), and yours should be seen."""

import math
from collections import deque

from dsv3.config import GuardConfig


class SpikeDetector:
    """Whether a loss lies far above those before it: more than `spike_deviations` standard deviations above the mean.

    Mean and deviation are those of the last `spike_window` finite losses that were no spikes themselves; until there
    are that many, nothing is a spike. Losses fall over time, which only makes it slower to cry.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._deviations = config.spike_deviations
        self._losses: deque[float] = deque(maxlen=config.spike_window)

    def is_spike(self, loss: float) -> bool:
        """Judge the next loss of the run, and remember it unless it is a spike. A loss that is not finite is one."""
        if not math.isfinite(loss):
            return True
        if len(self._losses) == self._losses.maxlen:
            mean = math.fsum(self._losses) / len(self._losses)
            variance = math.fsum((value - mean) ** 2 for value in self._losses) / len(self._losses)
            if loss > mean + self._deviations * math.sqrt(variance):
                return True
        self._losses.append(loss)
        return False
