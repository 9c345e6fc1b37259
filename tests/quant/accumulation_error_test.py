"""The report's claim about accumulation, at the size where it holds and at toy size; the metrics by hand."""

import numpy as np
import pytest

from dsv3.config import UserError
from dsv3.quant.accumulation_error import DISTRIBUTIONS, accumulation_error, error_of


def test_metrics_by_hand():
    exact = np.array([[2.0, -4.0], [0.0, 4.0]])
    found = exact + np.array([[0.02, 0.0], [5e-3, 0.01]])
    error = error_of(found, exact)
    np.testing.assert_allclose(error.largest, 0.01)  # the zero has no relative error
    np.testing.assert_allclose(error.median, 0.0025)
    np.testing.assert_allclose(error.of_rms, 0.02 / 3)
    np.testing.assert_allclose(error.norm, np.sqrt(4e-4 + 25e-6 + 1e-4) / 6)


def test_the_reports_two_percent():
    """Normal matrices, K = 4096, the largest error over the root mean square, 512 columns: nearly 2%.

    512 rows give 1.85%; 128 of them, for speed, 1.3%. Promotion every 128 elements leaves a twentieth of it.
    """
    without, promoted = (accumulation_error("normal", 4096, interval, size=128) for interval in (4096, 128))
    assert 0.01 < without.of_rms < 0.02
    assert promoted.of_rms < without.of_rms / 15


def test_sums_of_positive_numbers_lose_most_and_in_one_direction():
    """Truncation adds up: 7% in every element of a uniform sum, growing with K; with promotion none of that."""
    errors = {k: accumulation_error("uniform", k, k) for k in (128, 1024, 4096)}
    assert errors[128].median < 0.001 < 0.01 < errors[1024].median < 0.02 < 0.06 < errors[4096].median < 0.09
    promoted = accumulation_error("uniform", 4096, 128)
    assert promoted.median < 0.001 and promoted.largest < 0.001


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_promotion_helps_everywhere_and_the_error_then_stops_growing(distribution):
    """At toy size: 512 and 2048 products."""
    error = lambda k, interval: accumulation_error(distribution, k, interval, size=32).norm
    assert error(2048, 128) < 0.5 * error(2048, 2048)
    assert error(2048, 2048) > 1.3 * error(512, 512)
    assert error(2048, 128) < 1.3 * error(512, 128)


def test_a_largest_relative_error_of_numbers_with_signs_says_nothing():
    """Some element is near zero: the elementwise maximum is two orders above what the matrix as a whole is off by."""
    error = accumulation_error("normal", 4096, 128)
    assert error.largest > 100 * error.norm


def test_a_seed_is_a_draw_and_an_unknown_distribution_is_refused():
    first, second = (accumulation_error("normal", 128, 128, size=32, seed=seed) for seed in (0, 1))
    assert first != second and first == accumulation_error("normal", 128, 128, size=32)
    with pytest.raises(UserError, match="unknown distribution 'cauchy'; expected one of normal"):
        accumulation_error("cauchy", 128, 128)
