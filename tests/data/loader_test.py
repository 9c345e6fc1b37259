"""Loader: the weights of both segment rules, epochs, mixtures, and one stream whatever the processes and restarts."""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from dsv3.config import DataConfig, SourceConfig, UserError
from dsv3.data.loader import PERIOD, Mixture, predictions, train_loader
from dsv3.data.prepare import Prepared, Shard
from dsv3.model.batch import Batch

LENGTH = 5
CONFIG = DataConfig(
    sources=(SourceConfig(files=None, text_field="text", weight=1.0),), validation_fraction=0.1, tokenizer="bytes",
    bpe_vocab_size=300, split_rate=0.0, fim_rate=0.0, segment_ids=False, eval_bytes=100, eval_stride=4, seed=0)


def config(*weights, seed=0):
    sources = tuple(SourceConfig(files=None, text_field="text", weight=weight) for weight in weights)
    return dataclasses.replace(CONFIG, sources=sources, seed=seed)


@functools.lru_cache
def prepared(*sizes):
    """Sources of shards with that many rows; row r of source s is recognised by its first token, 10000 s + r."""
    sources = []
    for number, shards in enumerate(sizes):
        first = np.cumsum([0, *shards]) + 10_000 * number
        tokens = [np.arange(start, start + n)[:, None] + 100_000 * np.arange(LENGTH) for start, n in zip(first, shards)]
        sources.append(tuple(Shard(tokens_RL.astype(np.int32), np.ones((n, LENGTH), np.uint16))
                             for n, tokens_RL in zip(shards, tokens)))
    return Prepared(None, tuple(sources), [], b"", {})


def take(iterator, n):
    """The rows of the next n batches, by their first tokens."""
    return np.concatenate([np.asarray(batch.tokens_BT)[:, 0] for batch in itertools.islice(iterator, n)] or [[]])


SIZES, WEIGHTS = ((3, 4, 1), (5,), (1, 1)), (0.5, 0.3, 0.2)


@functools.cache
def stream(n=3000):
    """The first rows, read one by one."""
    return take(train_loader(prepared(*SIZES), config(*WEIGHTS), 1), n)


def test_a_row_by_hand():
    tokens = np.array([[7, 8, 9, 7, 8, 0]], np.uint16)
    segments = np.array([[1, 1, 1, 2, 2, 0]], np.uint16)
    apart = predictions(tokens, segments, segment_ids=True)
    joined = predictions(tokens, segments, segment_ids=False)
    for example in (apart, joined):
        assert [field.dtype for field in example] == [np.int32, np.int32, np.float32, np.int32]
        np.testing.assert_array_equal(example.tokens_BT, [[7, 8, 9, 7, 8]])
        np.testing.assert_array_equal(example.targets_BT, [[8, 9, 7, 8, 0]])
    np.testing.assert_array_equal(apart.weights_BT, [[1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(apart.segment_ids_BT, [[1, 1, 1, 2, 2]])
    np.testing.assert_array_equal(joined.weights_BT, [[1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(joined.segment_ids_BT, [[1, 1, 1, 1, 1]])
    padded = predictions(np.array([[7, 0, 0]]), np.array([[1, 0, 0]]), segment_ids=False)
    np.testing.assert_array_equal(padded.segment_ids_BT, [[1, 0]])


def test_batches_are_pytrees_of_whole_rows():
    batch = next(train_loader(prepared((4, 2)), config(1.0), 3))
    assert isinstance(batch, Batch)
    assert [leaf.shape for leaf in jax.tree.leaves(batch)] == [(3, LENGTH - 1)] * 4
    np.testing.assert_array_equal(batch.targets_BT - batch.tokens_BT, 100_000)  # from one row, in its order


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.integers(0, 2500), st.integers(1, 5))
def test_processes_together_read_the_one_stream(processes, rows_each, consumed, batches):
    rows = processes * rows_each
    parts = [take(train_loader(prepared(*SIZES), config(*WEIGHTS), rows, consumed=consumed, process_index=process,
                               process_count=processes), batches).reshape(batches, rows_each)
             for process in range(processes)]
    together = np.concatenate(parts, axis=1).reshape(-1)
    np.testing.assert_array_equal(together, stream()[consumed:consumed + batches * rows])


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=5))
def test_a_run_may_stop_anywhere_and_go_on_with_other_batches(sessions):
    """Each session takes some batches of its own size, while its threads read further than is used."""
    seen, consumed = [], 0
    for rows, batches in sessions:
        seen.append(take(train_loader(prepared(*SIZES), config(*WEIGHTS), rows, consumed=consumed), batches))
        consumed += rows * batches
    np.testing.assert_array_equal(np.concatenate(seen), stream()[:consumed])


def test_an_epoch_of_a_source_holds_each_of_its_rows_once_in_a_new_order():
    rows = stream()
    for number, shards in enumerate(SIZES):
        own = rows[rows // 10_000 == number]
        epochs = own[:len(own) // sum(shards) * sum(shards)].reshape(-1, sum(shards))
        assert len(epochs) > 80
        expected = np.arange(sum(shards)) + 10_000 * number
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(expected, epochs.shape))
    orders = rows[rows < 10_000][:10 * 8].reshape(10, 8)
    assert len({tuple(order) for order in orders}) == 10


def test_every_order_is_as_likely():
    """Rows by place over epochs of 5: each of 25 cells 1/5."""
    epochs = take(train_loader(prepared((2, 3)), config(1.0), 500), 20).reshape(-1, 5)
    shares = [[np.mean(epochs[:, place] == row) for row in range(5)] for place in range(5)]
    np.testing.assert_allclose(shares, 0.2, atol=0.045)  # five standard deviations of 0.009


def test_seed_and_source_decide_the_order():
    order = lambda seed: take(train_loader(prepared((20,), (20,)), config(1.0, 1.0, seed=seed), 40), 1)
    np.testing.assert_array_equal(order(1), order(1))
    assert np.any(order(1) != order(2))
    first, second = order(1)[::2], order(1)[1::2]
    assert np.any(first != second - 10_000)  # equal sources do not march in step


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
    st.lists(st.floats(0.001, 1000), min_size=1, max_size=6), st.integers(0, 10**12), st.integers(1, 3000))
def test_every_window_is_close_to_proportional(weights, start, length):
    sources, _ = Mixture(weights)(start + np.arange(length))
    shares = np.array(weights) / sum(weights)
    counts = np.bincount(sources, minlength=len(weights))
    slack = 1 + len(weights) * shares + length * len(weights) / PERIOD
    assert np.all(np.abs(counts - length * shares) <= slack + 1e-6)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=5))
def test_a_mixture_counts_every_source_without_gaps(weights):
    """Across the seam of two periods; a source of the smallest weight still comes."""
    sources, places = Mixture(weights)(np.arange(2 * PERIOD + 10 * len(weights)))
    for source in range(len(weights)):
        own = places[sources == source]
        assert len(own) > 0
        np.testing.assert_array_equal(own, np.arange(len(own)))


def test_shares_converge_to_the_weights():
    sources, _ = Mixture([1, 10, 0.5])(np.arange(10**6))
    np.testing.assert_allclose(np.bincount(sources) / 10**6, np.array([1, 10, 0.5]) / 11.5, atol=2e-5)


def test_starting_far_in_is_instant():
    start = time.perf_counter()
    next(train_loader(prepared((1000,), (2000,)), config(0.1, 0.9), 8, consumed=10**12))
    assert time.perf_counter() - start < 1  # 0.02 s; reading up to there would take days


def test_mistakes_are_refused_when_the_loader_is_made():
    with pytest.raises(UserError, match="a batch of 6 rows cannot be divided evenly among 4 processes"):
        train_loader(prepared((8,)), config(1.0), 6, process_count=4)
    with pytest.raises(UserError, match="after -1 consumed rows"):
        train_loader(prepared((8,)), config(1.0), 4, consumed=-1)


def test_a_loader_that_is_held_or_dropped_lets_the_interpreter_exit():
    program = textwrap.dedent("""
        import threading, time
        from loader_test import config, prepared, train_loader
        before = threading.active_count()
        dropped, held = (train_loader(prepared((8,)), config(1.0), 2) for _ in range(2))
        next(dropped), next(held)
        del dropped
        deadline = time.monotonic() + 10
        while threading.active_count() > before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        print(threading.active_count() - before)
    """)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True,
                              env=os.environ | {"PYTHONPATH": paths})
    assert finished.stdout.split() == ["2"] and finished.stderr == ""  # the held loader's
