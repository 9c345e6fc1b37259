"""64-bit fingerprints of arrays where they are, on device or host: whether two copies of a state are the same."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3.config import UserError

ODD = ((0x9E3779B1, 0x85EBCA6B), (0xC2B2AE35, 0x27D4EB2F))  # well mixed odd constants, a pair for each half
PIECE = 1 << 17
"""Elements that a worker on the host takes at a time: its few temporary arrays of 512 KB stay in the core's cache."""


def _halves(xp: ModuleType, words: chex.Array, index: chex.Array) -> chex.Array:
    """The formula of `fingerprint_array`, in NumPy or in jnp: the two must never differ."""
    return xp.stack([
        xp.sum((words ^ (index * np.uint32(a))) * ((index * np.uint32(b)) | np.uint32(1)), dtype=np.uint32)
        for a, b in ODD])


def _words(array: jax.Array) -> jax.Array:
    """The bits of every element as uint32."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    width = array.dtype.itemsize
    assert width <= 4, f"{array.dtype} has more than 32 bits"
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """The flat index of every element, modulo 2^32, without a reshape that would gather a sharded array."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def fingerprint_array(array: jax.Array) -> jax.Array:
    """uint32 [2]: sum over elements of (bits xor a(i)) * odd(i), modulo 2^32, with two sets of constants.

    Each term is a bijection of its element's bits, so one changed element always changes both halves; anything else
    goes unnoticed once in 2^64. The sum does not depend on how the array is divided over devices.
    """
    return _halves(jnp, _words(array), _positions(array.shape))


@jax.jit
def _on_device(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: fingerprint_array(array) for name, array in arrays.items()}


def _on_host(array: np.ndarray, release: Callable[[], None] = lambda: None) -> np.ndarray:
    """`fingerprint_array` of a NumPy array, in pieces on all cores: a sum over elements can be taken in any order."""
    assert array.dtype.itemsize <= 4, f"{array.dtype} has more than 32 bits"
    words = array.reshape(-1).view(f"uint{8 * array.dtype.itemsize}")
    sums, span = np.zeros(2, np.uint32), 256 * PIECE
    if words.size <= PIECE:  # needs no threads
        sums = _piece(words, 0)
        release()
        return sums
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, words.size, span):
            starts = range(first, min(first + span, words.size), PIECE)
            sums += np.sum(list(pool.map(lambda start: _piece(words, start), starts)), axis=0, dtype=np.uint32)
            release()
    return sums


def _piece(words: np.ndarray, start: int) -> np.ndarray:
    """The share of the elements from `start` on in the fingerprint of their array."""
    part = words[start:start + PIECE].astype(np.uint32, copy=False)
    return _halves(np, part, np.arange(start, start + part.size).astype(np.uint32))


def fingerprint_of_file(array: np.ndarray, release: Callable[[], None]) -> str:
    """The fingerprint of an array that is mapped from a file; `release` gives its pages back, every 128 MB or so."""
    return _text(_on_host(array, release))


def leaf_names(tree: chex.ArrayTree) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


def _in_host_memory(leaf: chex.Array) -> bool:
    """Whether NumPy can read it where it is: nothing has to be compiled for it then."""
    return not isinstance(leaf, jax.Array) or [device.platform for device in leaf.devices()] == ["cpu"]


def fingerprints(tree: chex.ArrayTree) -> dict[str, str]:
    """Path of every leaf -> its fingerprint, 16 hexadecimal digits, computed where the leaf is."""
    leaves = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
    host = {name: np.asarray(leaf) for name, leaf in leaves.items() if _in_host_memory(leaf)}
    device = _on_device({name: leaf for name, leaf in leaves.items() if name not in host})  # while the host computes
    halves = {name: _on_host(leaf) for name, leaf in host.items()} | jax.device_get(device)
    return {name: _text(halves[name]) for name in leaves}


def _text(halves: chex.Array) -> str:
    return "".join(f"{int(half):08x}" for half in halves)


def replica_fingerprints(mesh: Mesh, tree: chex.ArrayTree) -> np.ndarray:
    """uint32 [device of the mesh, leaf, 2]: what every device holds of arrays that should be replicated."""

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def gather(local):
        return jax.lax.all_gather(jnp.stack(jax.tree.map(fingerprint_array, jax.tree.leaves(local))), mesh.axis_names)

    return np.asarray(jax.device_get(gather(tree)))


def check_replicas(mesh: Mesh, tree: chex.ArrayTree) -> None:
    """Raise `UserError` naming devices and arrays unless all replicas of `tree` are equal, bit for bit."""
    if mesh.size == 1 or not jax.tree.leaves(tree):
        return
    found = replica_fingerprints(mesh, tree).reshape(mesh.size, -1, 2)
    rows, counts = np.unique(found.reshape(mesh.size, -1), axis=0, return_counts=True)
    if len(rows) == 1:
        return
    common = rows[np.argmax(counts)].reshape(found.shape[1:])
    different = np.any(found != common, axis=-1)
    devices = [f"{device} (process {device.process_index})"
               for device, bad in zip(mesh.devices.flat, different.any(axis=1), strict=True) if bad]
    names = [name for name, bad in zip(leaf_names(tree), different.any(axis=0), strict=True) if bad]
    raise UserError(f"replicas disagree: {', '.join(devices)} hold other values than the rest in {', '.join(names[:5])}"
                    f"{' and more' if len(names) > 5 else ''}; restart from the last checkpoint, without that hardware")
