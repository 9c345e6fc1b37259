"""Prefetching: the results of `map`, in order, ahead of their use but not further than asked, and no thread left."""

import itertools
import threading
import time

import pytest

from dsv3.data.prefetch import prefetch


def started_since(before):
    """The living threads that are not in `before`: a count would also notice threads of earlier tests that end."""
    return set(threading.enumerate()) - before


def end_soon(before):
    """Whether every thread that is not in `before` ends within five seconds."""
    deadline = time.monotonic() + 5
    while started_since(before) and time.monotonic() < deadline:
        time.sleep(0.001)
    return not started_since(before)


@pytest.mark.parametrize("n", [0, 1, 3, 50])
def test_results_come_in_order_whichever_thread_is_first(n):
    def slow_at_first(item):
        time.sleep(0.002 * (item % 3 == 0))
        return item * item

    assert list(prefetch(slow_at_first, range(n), threads=4, ahead=7)) == [item * item for item in range(n)]


def test_it_reads_ahead_and_no_further():
    started = []
    results = prefetch(started.append, itertools.count(), threads=2, ahead=3)
    assert started == []
    for taken in range(1, 20):
        next(results)
        deadline = time.monotonic() + 5
        while len(started) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(started) == taken + 3
    results.close()


def test_work_overlaps():
    """Four items that wait for one another need four threads."""
    barrier = threading.Barrier(4, timeout=5)
    list(prefetch(lambda _: barrier.wait(), range(4), threads=4, ahead=4))


def test_an_error_takes_the_place_of_its_result_and_ends_the_threads():
    before = set(threading.enumerate())
    results = prefetch(lambda item: 1 // (2 - item), itertools.count(), threads=2, ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert end_soon(before)


@pytest.mark.parametrize("end", ["exhausted", "closed", "dropped"])
def test_threads_end_with_the_iterator(end):
    before = set(threading.enumerate())
    results = prefetch(lambda item: item, range(100), threads=3, ahead=10)
    next(results)
    assert started_since(before)
    if end == "exhausted":
        list(results)
    elif end == "closed":
        results.close()
    del results
    assert end_soon(before)
