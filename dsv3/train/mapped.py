"""A checkpoint of imported weights: every array a plain file, memory-mapped, so that it is written and read in parts.

An array may be stored in another dtype than the model's, or as `Blocks` (FP8); it is converted slice by slice when it
is read. Training goes on from it with fresh moments, and saves what it makes of it through Orbax.
"""

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dsv3.parallel.fingerprint import fingerprint_of_file, leaf_names
from dsv3.quant.blocks import Blocks, dequantize_blocks

RECORD_FILE = "record.json"
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of every array, as in `params/moe_layers/attn/o` or, of `Blocks`, `.../o/values` -> its dtype and shape."""


def create(directory: Path, name: str, dtype: str, shape: tuple[int, ...]) -> np.memmap:
    """An array to be filled, its room on the disk taken at once; what an earlier call has made is opened again.

    Raises `OSError` when the disk is full, which otherwise would kill a process that writes to mapped memory.
    """
    path = _file(directory, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    n_bytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    if not path.exists() or path.stat().st_size != n_bytes:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    return np.memmap(path, jnp.dtype(dtype), "r+", shape=shape)


def open_arrays(directory: Path, shapes: Shapes) -> dict[str, np.memmap]:
    """The arrays of a finished checkpoint. Raises `OSError` or `ValueError` for files that are missing or too short."""
    return {name: np.memmap(_file(directory, name), jnp.dtype(dtype), "r", shape=tuple(shape))
            for name, (dtype, shape) in shapes.items()}


def release(array: np.memmap) -> None:
    """Take an array's pages out of this process's memory; the file keeps them."""
    array._mmap.madvise(mmap.MADV_DONTNEED)


def fingerprint(array: np.memmap) -> str:
    """See `fingerprints`. Leaves no page in memory."""
    return fingerprint_of_file(np.asarray(array), lambda: release(array))


def damaged(directory: Path, shapes: Shapes, expected: Mapping[str, str]) -> list[str]:
    """Arrays whose fingerprint is not `expected`. The processes of a job share the work: each looks at some of them."""
    mine = sorted(shapes)[jax.process_index()::jax.process_count()]
    arrays = open_arrays(directory, {name: shapes[name] for name in mine})
    return [name for name, array in arrays.items() if fingerprint(array) != expected[name]]


def read(directory: Path, shapes: Shapes, trees: Mapping[str, chex.ArrayTree]) -> dict[str, chex.ArrayTree]:
    """Trees of shapes, dtypes and shardings -> arrays: those of this checkpoint, converted, and zeros for the others.

    Only the slices that this process's devices need are read.
    """
    return {collection: _read(directory, shapes, collection, tree) for collection, tree in trees.items()}


def _read(directory: Path, shapes: Shapes, collection: str, tree: chex.ArrayTree) -> chex.ArrayTree:
    leaves, structure = jax.tree.flatten(tree)
    if not any(name.startswith(f"{collection}/") for name in shapes):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), tree)
    found = []
    for name, leaf in zip(leaf_names(tree), leaves, strict=True):
        name = f"{collection}/{name}"
        parts = (name,) if name in shapes else (f"{name}/values", f"{name}/scales")
        stored = list(open_arrays(directory, {part: shapes[part] for part in parts}).values())
        if stored[0].shape != leaf.shape:
            raise ValueError(f"{name} has shape {stored[0].shape}, expected {leaf.shape}")
        array = Blocks(*stored) if len(stored) > 1 else stored[0]
        convert = lambda index, array=array, leaf=leaf: _part(array, index, leaf)
        found.append(jax.block_until_ready(jax.make_array_from_callback(leaf.shape, leaf.sharding, convert)))
        for part in stored:
            release(part)
    return jax.tree.unflatten(structure, found)


def _part(array: Any, index: tuple[slice, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """A slice of a stored array, in the dtype of `leaf`."""
    if not isinstance(array, Blocks):
        return np.array(array[index], leaf.dtype)
    ranges = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
    part, first = np.empty([len(r) for r in ranges], leaf.dtype), (ranges[-2].start, ranges[-1].start)
    for at in np.ndindex(part.shape[:-2]):
        there = tuple(r[i] for r, i in zip(ranges[:-2], at, strict=True))
        part[at] = dequantize_blocks(array.values[there][index[-2:]], array.scales[there], first)
    return part


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.bin"
