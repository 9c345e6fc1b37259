"""Weights of ours as a Hugging Face checkpoint."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from dsv3.config import ModelConfig, require
from dsv3.interop.hf_config import to_hf_config
from dsv3.interop.layout import SCALE, Entry, Path, scale_shape, table
from dsv3.interop.safetensors import DTYPES, FILE_BYTES, NAMES, n_bytes, write
from dsv3.quant.blocks import BLOCK, Blocks, block_scales, dequantize_blocks, n_blocks, quantize_blocks

FP8 = "F8_E4M3"
PLAN = "plan.sha256"
FORMATS = {"bf16": "BF16", "float32": "F32", "fp8": "BF16"}
"""`--dtype` -> the dtype of what is not FP8; selection biases and scales are always float32."""
Arrays = Mapping[Path, Any]
"""Path -> array (NumPy, mapped or jax), or `Blocks` of two arrays."""


def flatten(variables: Mapping[str, Any]) -> Arrays:
    """The collections of a model by path."""
    is_leaf = lambda node: isinstance(node, Blocks)
    return {tuple(key.key for key in path): leaf
            for path, leaf in jax.tree.leaves_with_path(variables, is_leaf=is_leaf)}


def export(
    config: ModelConfig, arrays: Arrays, directory: FilePath, *, dtype: str | None = "bf16",
    base: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None, identity: str | None = None,
    file_bytes: int = FILE_BYTES,
    begin: Callable[[int], None] = lambda n_bytes: None, done: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write `config.json`, the weights, one tensor at a time, and `files` into a new `directory`.

    `dtype`: "bf16", "float32", or "fp8" (E4M3 with scales per block where the released checkpoints have it; weights
    that are `Blocks` are written as they are). None writes every array as it is stored. `base`: see `to_hf_config`.
    `begin` hears of all bytes, `done` of each tensor's.

    The directory appears by a rename when it is complete. With `identity`, a text that stands for the values of
    `arrays`, an export that was interrupted continues with the file it was at. Raises `UserError` where the directory
    exists, and for a model that the released code cannot express.
    """
    require(dtype is None or dtype in FORMATS, f"--dtype={dtype}; expected one of {', '.join(FORMATS)}")
    require(not directory.exists(), f"{directory} exists already; choose another directory or remove it")
    fp8 = dtype == "fp8" or (dtype is None and any(isinstance(array, Blocks) for array in arrays.values()))
    hf = to_hf_config(config, base, fp8=fp8)
    entries = {entry.name: entry for entry in table(config) + _buffers(arrays)}
    shapes = {}
    for entry in entries.values():
        shapes[entry.name] = _stored_dtype(entry, arrays[entry.path], dtype), entry.shape
        if shapes[entry.name][0] == FP8:
            shapes[entry.name + SCALE] = "F32", scale_shape(entry)

    def produce(name: str) -> np.ndarray:
        entry = entries[name.removesuffix(SCALE)]
        if name != entry.name:
            return _scales(entry, arrays[entry.path])
        return _tensor(entry, arrays[entry.path], shapes[name][0])

    partial = _begin(directory.absolute(), json.dumps([identity, hf, shapes, file_bytes]), identity is not None)
    try:
        begin(sum(n_bytes(*info) for info in shapes.values()))
        write(partial, shapes, produce, file_bytes=file_bytes, done=done)
        (partial / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        for name, content in (files or {}).items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        (partial / PLAN).unlink()
        os.rename(partial, directory)
    except BaseException:
        if identity is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _begin(directory: FilePath, plan: str, continues: bool) -> FilePath:
    """The place where `directory` grows: what an interrupted export of the same `plan` has left, or an empty one."""
    digest = hashlib.sha256(plan.encode()).hexdigest()
    partial = directory.with_name(f"{directory.name}.partial")
    if partial.exists():
        require((partial / PLAN).exists(), f"{partial} is in the way and is no unfinished export; remove it")
        if continues and (partial / PLAN).read_text() == digest:
            return partial
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / PLAN).write_text(digest)
    return partial


def _buffers(arrays: Arrays) -> list[Entry]:
    """Tensors that came with the weights and that the model does not need."""
    return [Entry(path[1], array.shape, path, tuple(slice(0, size) for size in array.shape), transpose=False)
            for path, array in arrays.items() if path[0] == "buffers"]


def _stored_dtype(entry: Entry, array: Any, dtype: str | None) -> str:
    """The safetensors dtype to write an entry in."""
    if dtype is None:
        return FP8 if isinstance(array, Blocks) else NAMES[np.dtype(array.dtype)]
    if entry.path[0] != "params":
        return "F32"
    return FP8 if dtype == "fp8" and entry.fp8 else FORMATS[dtype]


def _part(entry: Entry, array: Any, place: tuple[slice, ...]) -> np.ndarray:
    """`place` of an array as [out, in]."""
    part = np.asarray(array[place])
    matrix = part.reshape(part.shape[part.ndim - len(entry.shape):])
    return matrix.T if entry.transpose else matrix


def _block_place(entry: Entry) -> tuple[slice, ...]:
    """Where an entry's scales are in those of its array."""
    *lead, rows, columns = entry.place
    return (*lead, *(slice(axis.start // BLOCK, n_blocks(axis.stop)) for axis in (rows, columns)))


def _scales(entry: Entry, array: Any) -> np.ndarray:
    """The scales of an entry that is written in FP8."""
    if isinstance(array, Blocks):
        return _part(entry, array.scales, _block_place(entry))
    return block_scales(_part(entry, array, entry.place))


def _tensor(entry: Entry, array: Any, dtype: str) -> np.ndarray:
    """An entry's tensor in a safetensors dtype, out of the array that holds it."""
    if not isinstance(array, Blocks):
        matrix = _part(entry, array, entry.place)
        return quantize_blocks(matrix).values if dtype == FP8 else matrix.astype(DTYPES[dtype], copy=False)
    values = _part(entry, array.values, entry.place)
    return values if dtype == FP8 else dequantize_blocks(values, _scales(entry, array)).astype(DTYPES[dtype])
