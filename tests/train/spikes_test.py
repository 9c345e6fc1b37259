"""Loss spikes: found where they are, not where losses are merely noisy or falling."""

import math

import numpy as np
from tiny_models import train_config

from dsv3.train.spikes import SpikeDetector


def spikes(losses, window=50, deviations=6.0):
    detector = SpikeDetector(train_config(guard=dict(spike_window=window, spike_deviations=deviations)).guard)
    return [index for index, loss in enumerate(losses) if detector.is_spike(loss)]


def falling(steps=1000):
    rng = np.random.default_rng(0)
    return 3 + 7 * np.exp(-np.arange(steps) / 100) + 0.02 * rng.standard_normal(steps)


def test_planted_spikes_are_found_and_nothing_else():
    losses = falling()
    assert spikes(losses) == []
    losses[[300, 301, 302, 700]] += 1.0
    assert spikes(losses) == [300, 301, 302, 700]


def test_a_spike_does_not_hide_the_next_one():
    """It does not enter the mean or the deviation, however high it is."""
    losses = falling()
    losses[500], losses[510] = 100.0, losses[510] + 0.5
    assert spikes(losses) == [500, 510]


def test_a_loss_that_is_not_finite_is_a_spike_at_any_time():
    assert spikes([2.0, math.nan, 2.0, math.inf]) == [1, 3]


def test_nothing_is_judged_before_the_window_is_full():
    """With 49 losses of 50 seen, the next is taken as it is; the one after is the first to be judged."""
    losses = [1.0 + 0.01 * (i % 2) for i in range(49)]
    assert spikes([*losses, 9.0]) == []
    assert spikes([*losses, 1.0, 9.0]) == [50]
