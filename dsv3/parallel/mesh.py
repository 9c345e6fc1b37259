"""The mesh of devices, and where every array of a training state lives on it."""

from typing import Any

import chex
import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3.config import MeshConfig, require

DATA = "data"

RULES = (
    ("vocab", None),
    ("embed", None),
    ("q_latent", None),
    ("kv_latent", None),
    ("heads", None),
    ("hidden", None),
    ("router", None),
    ("norm", None),
    ("expert", None),
    ("layers", None),
)
"""Logical axis of a parameter (named where it is born) -> mesh axis. `data` holds replicas, so no parameter names it;
the optimizer's state is divided over it by `zero_spec`."""

BATCH = P(None, DATA)
"""Batches [M, B, T]: every device reads its own rows of every micro-batch."""


def make_mesh(config: MeshConfig) -> Mesh:
    """The first `config.n_devices` devices; in a run of several processes it must be all of them.

    Raises `UserError` when there are too few devices, or when a process would be left without work.
    """
    available = jax.device_count()
    require(config.n_devices <= available, f"mesh.data is {config.data}, but there are {available} devices "
            f"({jax.devices()[0].device_kind}); set --config.mesh.data={available} or start more processes")
    require(jax.process_count() == 1 or config.n_devices == available,
            f"mesh.data is {config.data}, but {jax.process_count()} processes hold {available} devices; "
            f"set --config.mesh.data={available}")
    return jax.make_mesh(
        (config.data,), (DATA,), axis_types=(AxisType.Auto,), devices=jax.devices()[:config.n_devices])


def parameter_specs(boxed: Any) -> Any:
    """A tree of `PartitionSpec` from parameters that still carry their logical axes, by `RULES`."""
    return nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)


def zero_axis(spec: P, shape: tuple[int, ...], size: int) -> int | None:
    """The axis that ZeRO-1 divides over `size` replicas: the longest that is whole and divisible; None if none is."""
    taken = (*spec, *[None] * (len(shape) - len(spec)))
    free = [axis for axis, length in enumerate(shape) if taken[axis] is None and length % size == 0]
    return max(free, key=lambda axis: shape[axis], default=None)


def zero_spec(spec: P, shape: tuple[int, ...], size: int) -> P:
    """`spec` of a parameter -> that of its optimizer moments and summed gradient (ZeRO-1, report section 3.2)."""
    axis = zero_axis(spec, shape, size)
    if axis is None:
        return spec
    return P(*(DATA if index == axis else (spec[index] if index < len(spec) else None) for index in range(len(shape))))


def shardings(mesh: Mesh, specs: chex.ArrayTree) -> chex.ArrayTree:
    """Specs to `NamedSharding`s."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def place_local(mesh: Mesh, local: Any) -> Any:
    """Batches [M, B, T] on the mesh; each process gives the rows of its own devices."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), local)


def place_global(mesh: Mesh, batch: Any, spec: P) -> Any:
    """Arrays that every process holds whole, divided over the mesh by `spec`."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda array: jax.make_array_from_callback(array.shape, sharding, np.asarray(array).__getitem__), batch)


def place_like(host: chex.ArrayTree, placed: chex.ArrayTree) -> chex.ArrayTree:
    """Host arrays that every process holds whole, where their counterparts in `placed` live."""
    return jax.tree.map(
        lambda array, like: jax.make_array_from_callback(array.shape, like.sharding, array.__getitem__), host, placed)


def on_one_device(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Replicated arrays as plain arrays of one local device: what a program outside the mesh takes."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)
