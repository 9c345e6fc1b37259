"""A Hugging Face checkpoint on disk as parameters: checked as a whole, read slice by slice, born where they live."""

import math
from functools import partial
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import ModelConfig, require
from dsv3.interop.hf_config import is_fp8, to_model_config
from dsv3.interop.layout import SCALE, Entry, Path, kept_fp8, leaf_shapes, leaves, scale_shape, table
from dsv3.interop.safetensors import DTYPES, Reader, read_json
from dsv3.model.rope import frequencies
from dsv3.parallel.fingerprint import leaf_names
from dsv3.quant.blocks import Blocks, dequantize_blocks

FP8, FLOATS = "F8_E4M3", ("BF16", "F32", "F16")
BUFFER = "self_attn.rotary_emb.inv_freq"
"""Moonlight's and Kimi-K2's files also hold the rotary frequencies of every layer."""
HOST_BYTES = 1 << 28
"""Shards up to this size are put together on the host."""
Region = tuple[slice, ...]


class Source(NamedTuple):
    """A checkpoint whose names, shapes and dtypes agree with its `config.json` (`hf`).

    `entries` fill our arrays, of the dtypes in `dtypes`; FP8 matrices are dequantised when they are read, unless `keep`
    (every tensor stays as it is stored).
    """

    reader: Reader
    hf: dict[str, Any]
    config: ModelConfig
    entries: list[Entry]
    dtypes: dict[Path, np.dtype]
    keep: bool


def open_source(directory: FilePath, dtype: str | None) -> Source:
    """Check everything that can be checked without reading a weight; `dtype` None keeps what is stored.

    Raises `UserError` for a configuration or file that is not understood, a tensor that is missing, unknown, or of
    another shape or dtype than the configuration says, and scales that are missing or misshapen.
    """
    hf = read_json(directory / "config.json")
    config, reader = to_model_config(hf), Reader(directory)
    weights = table(config) + _buffers(config, reader)
    _check_tensors(reader, weights, fp8=is_fp8(hf))
    keep = dtype is None
    entries = list(kept_fp8(weights)) if keep and is_fp8(hf) else weights
    dtypes = {path: _dtype(reader, path, parts, dtype) for path, parts in leaves(entries).items()}
    return Source(reader, hf, config, entries, dtypes, keep)


def load(directory: FilePath, *, dtype: str | None = "float32", shardings: Any = None) -> tuple[ModelConfig, dict]:
    """The model and its variables, `params` and `routing`, of a checkpoint.

    Weights are `dtype` ("float32", "bfloat16"), dequantised if they are FP8; None keeps them as they are stored, FP8
    matrices as `Blocks`. Every array is born where `shardings` (a tree like the variables) says and filled in place,
    one tensor at a time, from the slices that this process's shards need.

    Raises `UserError` as `open_source`, for scales that are not finite, and for copies of the embedding or head that
    differ from it.
    """
    source = open_source(directory, dtype)
    check_copies(source)
    given = dict(zip(leaf_names(shardings), jax.tree.leaves(shardings), strict=True))
    shapes, found = leaf_shapes(source.entries), {"params": {}, "routing": {}}
    for path, entries in leaves(source.entries).items():
        if path[0] not in found:
            continue
        *above, name = path
        node = found
        for key in above:
            node = node.setdefault(key, {})
        node[name] = _place(source, entries, shapes[path], _sharding(given, path))
    return source.config, _blocks(found)


def _sharding(given: dict[str, jax.sharding.Sharding], path: Path) -> jax.sharding.Sharding:
    """Where an array lives: as `given`, where the scales of a kept FP8 matrix may be left out (all of them everywhere).

    Without any, everything lives on the first device.
    """
    if not given:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    name, matrix = "/".join(path), "/".join(path[:-1])
    require(name in given or matrix in given, f"shardings lack {name}; give one for each array")
    if name not in given and path[-1] == "scales":
        return jax.sharding.NamedSharding(given[matrix].mesh, jax.sharding.PartitionSpec())
    return given.get(name, given.get(matrix))


def _place(source: Source, entries: list[Entry], shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of `shape` where `sharding` says, filled tensor by tensor. Replicas are copies of one another."""
    first, shards = {}, []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        region = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
        key = tuple((part.start, part.stop) for part in region)
        if key not in first:
            first[key] = _shard(source, entries, region, device)
        shards.append(jax.device_put(first[key], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _shard(source: Source, entries: list[Entry], region: Region, device: jax.Device) -> jax.Array:
    """A region of an array on a device.

    A small one is put together on the host, which needs no compiled program; a large one grows where it lives.
    """
    shape, dtype = [part.stop - part.start for part in region], source.dtypes[entries[0].path]
    on_host = math.prod(shape) * dtype.itemsize <= HOST_BYTES
    shard = np.empty(shape, dtype) if on_host else jnp.zeros(shape, dtype, device=device)
    for entry in entries:
        part = common(entry.place, region)
        if part is None:
            continue
        place = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, region, strict=True))
        values = read_part(source, entry, part)
        if on_host:
            shard[place] = values
        else:
            shard = _put(shard, values, [axis.start for axis in place])
        source.reader.release(entry.name)
    return jax.device_put(shard, device)


@partial(jax.jit, donate_argnums=0)
def _put(shard: jax.Array, part: jax.Array, start: list[int]) -> jax.Array:
    """`shard` with `part` in it, in place. By bits: XLA's CPU copies E4M3 as such a thousand times slower."""
    bits = partial(jax.lax.bitcast_convert_type, new_dtype=f"uint{8 * shard.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(
        jax.lax.dynamic_update_slice(bits(shard), bits(part), start), shard.dtype)


def common(place: Region, region: Region) -> Region | None:
    """What two parts of an array share, or None."""
    part = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(place, region, strict=True))
    return part if all(axis.start < axis.stop for axis in part) else None


def read_part(source: Source, entry: Entry, part: Region) -> np.ndarray:
    """The values of `part`, of our array that `entry` fills, in its dtype. Raises `UserError` for bad scales."""
    lead = len(entry.place) - len(entry.shape)
    index = tuple(slice(a.start - b.start, a.stop - b.start)
                  for a, b in zip(part[lead:], entry.place[lead:], strict=True))
    index = index[::-1] if entry.transpose else index
    values, dtype = source.reader.read(entry.name, index), source.dtypes[entry.path]
    if entry.name.endswith(SCALE):
        _check_scales(entry.name, values)
    if values.dtype == DTYPES[FP8] and not source.keep:
        name = entry.name + SCALE
        scales = source.reader.read(name)
        _check_scales(name, scales)
        values = dequantize_blocks(values, scales, (index[0].start, index[1].start))
    values = values.T if entry.transpose else values
    return values.astype(dtype, copy=False).reshape([axis.stop - axis.start for axis in part])


def check_copies(source: Source) -> None:
    """Raise `UserError` unless the MTP module's embedding and head are the main model's, byte for byte."""
    originals = {entry.path: entry.name for entry in source.entries if not entry.copy}
    for entry in source.entries:
        if not entry.copy:
            continue
        original, rows = originals[entry.path], max(1, (1 << 26) // entry.shape[1])
        for start in range(0, entry.shape[0], rows):
            pair = [source.reader.read(name, (slice(start, start + rows),)) for name in (entry.name, original)]
            same = pair[0].dtype == pair[1].dtype and np.array_equal(*(part.view(np.uint8) for part in pair))
            require(same, f"{entry.name} differs from {original}; they are one array in this model")
        source.reader.release(entry.name)
        source.reader.release(original)


def _check_scales(name: str, scales: np.ndarray) -> None:
    require(bool(np.isfinite(scales).all() and (scales >= 0).all()),
            f"{name} holds scales that are negative or not finite; download the file again")


def _check_tensors(reader: Reader, weights: list[Entry], *, fp8: bool) -> None:
    """Names, shapes and dtypes of all tensors are those of the configuration."""
    expected = {entry.name: (entry.shape, (FP8,) if fp8 and entry.fp8 else FLOATS) for entry in weights}
    if fp8:
        expected |= {entry.name + SCALE: (scale_shape(entry), ("F32",)) for entry in weights if entry.fp8}
    missing = sorted(set(expected) - set(reader.tensors))
    hint = "; if the MTP module was left out, set num_nextn_predict_layers to 0" if any(
        "eh_proj" in name for name in missing) else ""
    require(not missing, f"{reader.directory} lacks {len(missing)} tensors that its config.json calls for, the first "
            f"is {(missing or [''])[0]}{hint}")
    unknown = sorted(set(reader.tensors) - set(expected))
    require(not unknown, f"{reader.directory} has {len(unknown)} tensors that its config.json does not call for, the "
            f"first is {(unknown or [''])[0]}")
    for name, (shape, dtypes) in expected.items():
        info = reader.tensors[name]
        require(info.shape == shape, f"{name} has shape {list(info.shape)}; config.json calls for {list(shape)}")
        require(info.dtype in dtypes, f"{name} is {info.dtype}; config.json calls for {' or '.join(dtypes)}")


def _buffers(config: ModelConfig, reader: Reader) -> list[Entry]:
    """Rotary frequencies that a checkpoint stores. Raises `UserError` unless they are the configuration's."""
    size, found = config.attention.qk_rope_head_dim // 2, []
    plain = config.attention.rope_theta ** (-np.arange(size) / size)
    for layer in range(config.n_layers + config.mtp.depth):
        name = f"model.layers.{layer}.{BUFFER}"
        if name in reader.tensors and reader.tensors[name].shape == (size,):
            values = reader.read(name).astype(np.float64)
            require(any(np.allclose(values, right, rtol=1e-2, atol=0) for right in
                        (plain, frequencies(config.attention))),
                    f"{name} holds other frequencies than rope_theta={config.attention.rope_theta} gives")
            found.append(Entry(name, (size,), ("buffers", name), (slice(0, size),), transpose=False))
    return found


def _dtype(reader: Reader, path: Path, entries: list[Entry], dtype: str | None) -> np.dtype:
    """Of the array at `path`; selection biases are float32 unless everything is kept."""
    stored = {reader.tensors[entry.name].dtype for entry in entries}
    if dtype is None or path[0] == "buffers":
        require(len(stored) == 1, f"the tensors of {'/'.join(path)} are {', '.join(sorted(stored))}, and one array "
                "here; import with --dtype=bfloat16 or float32")
        return DTYPES[stored.pop()]
    return np.dtype(np.float32) if path[0] == "routing" else jnp.dtype(dtype)


def _blocks(tree: Any) -> Any:
    """Pairs of values and scales as `Blocks`."""
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {"values", "scales"}:
        return Blocks(**tree)
    return {name: _blocks(node) for name, node in tree.items()}
