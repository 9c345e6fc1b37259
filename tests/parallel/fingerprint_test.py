"""Fingerprints: any changed bit shows, the division over devices and the place do not."""

import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from tiny_models import mesh_of

from dsv3.parallel import fingerprint
from dsv3.parallel.fingerprint import fingerprint_array, fingerprints
from dsv3.parallel.mesh import place_global

DTYPES = ["float32", "bfloat16", "int32", "uint16", "bool"]


def random_array(dtype, shape=(5, 8)):
    rng = np.random.default_rng(0)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    size = jnp.dtype(dtype).itemsize
    return rng.integers(0, 256, (*shape, size), np.uint8).view(jnp.dtype(dtype))[..., 0]


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES[:-1]), element=st.integers(0, 39), bit=st.integers(0, 31))
def test_one_flipped_bit_changes_both_halves(dtype, element, bit):
    array = random_array(dtype)
    flipped = array.copy()
    words = flipped.reshape(-1).view(f"uint{8 * array.dtype.itemsize}")
    words[element] ^= words.dtype.type(1 << bit % (8 * array.dtype.itemsize))
    before, after = (np.asarray(fingerprint_array(jnp.asarray(a))) for a in (array, flipped))
    assert np.all(before != after)


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 39), second=st.integers(0, 39))
def test_two_exchanged_elements_show(first, second):
    array = np.arange(40, dtype=np.float32)
    exchanged = array.copy()
    exchanged[[first, second]] = exchanged[[second, first]]
    same = fingerprints({"a": jnp.asarray(array)}) == fingerprints({"a": jnp.asarray(exchanged)})
    assert same == (first == second)


SHAPES = [(), (0,), (3, 0), (1,), (7,), (2, 3, 5), (1, 1), (4, 64)]


@settings(max_examples=150, deadline=None)
@given(dtype=st.sampled_from([*DTYPES, "uint8", "float8_e4m3fn"]), shape=st.sampled_from(SHAPES), data=st.data())
def test_host_and_device_agree(dtype, shape, data):
    """In any layout and for any division into pieces, special values, empty arrays and scalars included."""
    array = np.frombuffer(data.draw(st.binary(min_size=4 * math.prod(shape), max_size=4 * math.prod(shape))), np.uint32)
    array = array.astype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    array = (array % 2 == 1 if dtype == "bool" else array.view(jnp.dtype(dtype))).reshape(shape)
    array = data.draw(st.sampled_from([array, array.T, array[()], np.asfortranarray(array)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "PIECE", data.draw(st.sampled_from([1, 3, 8, fingerprint.PIECE])))
        on_device = fingerprint._on_device({"a": jnp.asarray(array)})["a"]
        assert fingerprints({"a": array}) == {"a": fingerprint._text(np.asarray(on_device))}


def test_arrays_in_host_memory_stay_there_and_need_little_more_of_it(monkeypatch):
    monkeypatch.setattr(fingerprint.os, "cpu_count", lambda: 2)
    seen = []
    monkeypatch.setattr(fingerprint, "_on_device", lambda arrays: seen.extend(arrays) or arrays)
    large = np.ones(16 * 2**20, np.float32)  # 64 MB
    tracemalloc.start()
    one, many = jnp.zeros(2**20, jnp.float32), place_global(mesh_of(8), np.zeros(2, np.uint32), P())
    found = fingerprints({"host": large, "host too": one, "device": many})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == ["device"] and list(found) == ["device", "host", "host too"]
    assert peak < 2**23  # two workers, each a few arrays of a piece


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_does_not_depend_on_devices_or_on_being_numpy(dtype):
    array = random_array(dtype)
    whole = fingerprints({"a": array})
    for spec in (P(), P(None, "data")):
        assert fingerprints({"a": place_global(mesh_of(8), array, spec)}) == whole
    assert fingerprints({"a": jnp.asarray(array)}) == whole


def test_it_is_this_function():
    """By hand in Python integers. A change here makes every checkpoint of the past look damaged: do not make one."""
    array = np.array([[1.5, -2.0, 0.0], [np.inf, 1e-40, 3.0]], np.float32)
    halves = []
    for a, b in ((0x9E3779B1, 0x85EBCA6B), (0xC2B2AE35, 0x27D4EB2F)):
        words = array.reshape(-1).view(np.uint32).tolist()
        halves.append(sum((word ^ (i * a % 2**32)) * ((i * b % 2**32) | 1) for i, word in enumerate(words)) % 2**32)
    assert fingerprints({"x": array}) == {"x": f"{halves[0]:08x}{halves[1]:08x}"}


def test_leaves_have_readable_names():
    tree = {"layers": {"w": jnp.zeros(2)}, "count": jnp.int32(3)}
    assert list(fingerprints(tree)) == ["count", "layers/w"]
    assert jax.tree.structure(tree).num_leaves == 2
