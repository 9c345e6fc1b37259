"""A job for tests of imported weights: two processes load a checkpoint in shards and restore an imported run.

python tests/importers.py DIRECTORY, which holds `hf`, a checkpoint of `hf_models.RAGGED`, and `run`, its import.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from hf_models import RAGGED
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3.config import MeshConfig
from dsv3.interop.layout import kept_fp8, leaf_shapes, table
from dsv3.interop.load import load
from dsv3.interop.safetensors import Reader
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.distributed import fail_fast, initialise
from dsv3.parallel.fingerprint import fingerprints
from dsv3.parallel.mesh import make_mesh, zero_spec
from dsv3.train.checkpoint import Checkpoints
from dsv3.train.step import abstract_state, make_recipe


def sharded(hf, mesh):
    """Every array divided over the processes, and the bytes that this one read; copies are compared by both."""
    shardings, count, actual = {"params": {}, "routing": {}}, [0], Reader.read
    for path, shape in leaf_shapes(kept_fp8(table(RAGGED))).items():
        node = shardings
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = NamedSharding(mesh, zero_spec(P(), shape, mesh.size))

    def read(self, name, index=()):
        array = actual(self, name, index)
        count[0] += array.nbytes
        return array

    Reader.read = read
    _, variables = load(hf, dtype=None, shardings=shardings)
    Reader.read = actual
    return variables, count[0]


def main(directory):
    initialise()
    mesh = make_mesh(MeshConfig(data=2))
    divided, read = sharded(directory / "hf", mesh)
    _, whole = load(directory / "hf", dtype=None)
    for mine, all_of_it in zip(jax.tree.leaves(divided), jax.tree.leaves(whole), strict=True):
        (shard,) = mine.addressable_shards
        assert np.asarray(shard.data).tobytes() == np.asarray(all_of_it)[shard.index].tobytes()
    reader = Reader(directory / "hf")
    sizes = {name: info.stop - info.start for name, info in reader.tensors.items()}
    compared = 2 * sum(sizes[f"model.layers.3.{name}.weight"] for name in ("embed_tokens", "shared_head.head"))
    share = (read - compared) / (sum(sizes.values()) - compared / 2)
    print(f"read {share:.2f} of the checkpoint")

    with Checkpoints(directory / "run") as checkpoints:
        config = checkpoints.describe().config
        recipe = make_recipe(Transformer(config.model, reference_ops()), config.train, False, mesh)
        checkpoint, _ = checkpoints.restore(abstract_state(recipe), lambda description: None, ema=False)
    _, dense = load(directory / "hf")
    state = checkpoint.state
    assert fingerprints(state.params) == fingerprints(dense["params"])
    assert fingerprints(state.routing) == fingerprints(dense["routing"])
    assert int(state.step) == 0 and len(state.opt_state[1].mu["head"].sharding.device_set) == 2
    print("restored")


if __name__ == "__main__":
    with fail_fast():
        main(Path(sys.argv[1]))
