"""Checkpoints of plain files: any slice of any stored form, on any mesh, equals the converted whole."""

import errno
import os

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_models import mesh_of

from dsv3.parallel import fingerprint
from dsv3.quant.blocks import dequantize_blocks, quantize_blocks
from dsv3.train import mapped

ROWS, COLUMNS = 192, 320


@pytest.fixture
def stored(tmp_path):
    """A stack of two FP8 matrices with ragged blocks, a bfloat16 and a float32 array; and what they stand for."""
    rng = np.random.default_rng(0)
    pairs = [quantize_blocks(rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)) for _ in range(2)]
    arrays = {
        "params/a/values": np.stack([pair.values for pair in pairs]),
        "params/a/scales": np.stack([pair.scales for pair in pairs]),
        "params/b": rng.standard_normal((16, 8)).astype(ml_dtypes.bfloat16),
        "routing/c": rng.standard_normal(8).astype(np.float32)}
    shapes = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    for name, array in arrays.items():
        target = mapped.create(tmp_path, name, *shapes[name])
        target[...] = array
        target.flush()
    whole = {"params": {"a": np.stack([dequantize_blocks(*pair) for pair in pairs]),
                        "b": arrays["params/b"].astype(np.float32)}, "routing": {"c": arrays["routing/c"]}}
    return tmp_path, shapes, arrays, whole


def abstract(tree, mesh, specs):
    return jax.tree.map(lambda leaf, spec: jax.ShapeDtypeStruct(
        leaf.shape, jnp.float32, sharding=NamedSharding(mesh, spec)), tree, specs)


@pytest.mark.parametrize("spec", [P(), P("data"), P(None, "data"), P(None, None, "data")])
@pytest.mark.parametrize("n_devices", [1, 2])
def test_any_division_equals_the_whole(stored, spec, n_devices):
    directory, shapes, _, whole = stored
    specs = {"params": {"a": spec, "b": P(None, "data")}, "routing": {"c": P("data")}}
    wanted = abstract(whole, mesh_of(n_devices), specs)
    found = mapped.read(directory, shapes, wanted)
    chex.assert_trees_all_equal(found, whole)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, found),
                                jax.tree.map(lambda leaf: leaf.sharding, wanted))


def test_slices_that_begin_inside_a_block(stored):
    """Eight devices divide 320 columns into 40 each, 192 rows into 24: blocks are 128 wide."""
    directory, shapes, _, whole = stored
    for spec in (P(None, "data"), P(None, None, "data")):
        specs = {"params": {"a": spec, "b": P()}, "routing": {"c": P()}}
        chex.assert_trees_all_equal(mapped.read(directory, shapes, abstract(whole, mesh_of(8), specs)), whole)


def test_what_is_not_stored_begins_at_zero(stored):
    directory, shapes, _, _ = stored
    tree = abstract({"mu": np.zeros((4, 3))}, mesh_of(2), {"mu": P("data")})
    found = mapped.read(directory, shapes, {"opt_state": tree})["opt_state"]["mu"]
    assert found.sharding == tree["mu"].sharding and not found.any() and found.shape == (4, 3)


def test_another_shape_or_a_missing_array_is_an_error(stored):
    directory, shapes, _, whole = stored
    bad = abstract({"a": np.zeros((2, ROWS, COLUMNS + 1))}, mesh_of(1), {"a": P()})
    with pytest.raises(ValueError, match="has shape"):
        mapped.read(directory, shapes, {"params": bad})
    with pytest.raises(KeyError):
        mapped.read(directory, shapes, {"params": abstract({"z": np.zeros(3)}, mesh_of(1), {"z": P()})})


@pytest.mark.parametrize("piece", [16, 1 << 17])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_fingerprints_of_files_are_those_of_arrays(tmp_path, monkeypatch, dtype, piece):
    """In many pieces and releases, or in one of each."""
    monkeypatch.setattr(fingerprint, "PIECE", piece)
    released = []
    monkeypatch.setattr(mapped, "release", lambda array: released.append(array))
    values = np.random.default_rng(0).standard_normal((3, 5000)).astype(dtype)
    target = mapped.create(tmp_path, "params/a", str(values.dtype), values.shape)
    target[...] = values
    assert mapped.fingerprint(target) == fingerprint.fingerprints({"a": jnp.asarray(values)})["a"]
    assert len(released) == -(-values.size // (256 * piece))


def test_damage_is_named(stored):
    directory, shapes, arrays, _ = stored
    marks = {name: mapped.fingerprint(array) for name, array in mapped.open_arrays(directory, shapes).items()}
    assert mapped.damaged(directory, shapes, marks) == []
    target = mapped.create(directory, "params/b", *shapes["params/b"])
    target[3, 3] += 1
    target.flush()
    assert mapped.damaged(directory, shapes, marks) == ["params/b"]


def test_a_full_disk_is_an_error_before_memory_is_mapped(tmp_path, monkeypatch):
    """Writing to mapped memory without room would end the process by a signal."""
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        mapped.create(tmp_path, "params/a", "float32", (4,))


def test_creating_again_keeps_what_is_there(tmp_path):
    first = mapped.create(tmp_path, "params/a", "float32", (4,))
    first[...] = 7
    first.flush()
    assert (mapped.create(tmp_path, "params/a", "float32", (4,)) == 7).all()
