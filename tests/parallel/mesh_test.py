"""One device or eight: the same mathematics, replicas that stay equal, an optimizer that is really divided."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import (
    distance,
    mesh_of,
    model_config,
    random_batch,
    random_variables,
    recipe_of,
    train_config,
    train_state,
    transformer,
)

from dsv3.config import MeshConfig, UserError, resolve
from dsv3.model.transformer import Transformer
from dsv3.parallel.fingerprint import check_replicas, replica_fingerprints
from dsv3.parallel.mesh import BATCH, RULES, make_mesh, place_global, shardings, zero_axis, zero_spec
from dsv3.parallel.ops import make_ops
from dsv3.train.step import Knobs, abstract_state, make_gradients, make_init, make_train_step

CONFIG = model_config(n_layers=1, n_dense_layers=0)  # one MoE layer and one MTP module
TRAIN = train_config()
KNOBS = Knobs(*map(np.float32, (1e-2, 0.01, 0.3, 1e-2)))


def unequal_batches():
    """Two micro-batches of eight rows with 12, 0, 5, 1, 12, 3, 8 and 2 counted tokens: one device has only padding."""
    batch = random_batch(CONFIG, batch=16)
    length = np.tile([12, 0, 5, 1, 12, 3, 8, 2], 2)[:, None]
    valid = np.arange(12)[None] < length
    batch = batch._replace(weights_BT=valid.astype(np.float32), segment_ids_BT=valid.astype(np.int32))
    return jax.tree.map(lambda a: np.asarray(a).reshape(2, 8, 12), batch)


@cache
def gradients_and_losses(n_devices):
    mesh = mesh_of(n_devices)
    variables = place_global(mesh, random_variables(CONFIG), P())
    gradients = jax.jit(make_gradients(recipe_of(transformer(CONFIG), TRAIN, n_devices)))
    batches = place_global(mesh, unequal_batches(), BATCH)
    return jax.device_get(gradients(variables["params"], variables["routing"], batches, KNOBS))


@pytest.mark.parametrize("n_devices", [2, 8])
def test_gradients_and_losses_of_several_devices_are_those_of_one(n_devices):
    """Norm-wise 1e-6 in float32, with different numbers of tokens on every device."""
    (one, one_losses), (many, many_losses) = gradients_and_losses(1), gradients_and_losses(n_devices)
    total = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    assert distance(total(many), total(one)) < 1e-6
    for path, leaf in jax.tree.leaves_with_path(many):
        expected = dict(jax.tree.leaves_with_path(one))[path]
        assert distance(leaf, expected) < 3e-6, path
    for name in ("main", "mtp_D", "balance"):
        assert distance(getattr(many_losses, name), getattr(one_losses, name)) < 1e-6
    chex.assert_trees_all_equal(many_losses.load, one_losses.load)
    assert many_losses.tokens == one_losses.tokens == 2 * 43 and many_losses.sequences == 14


@pytest.mark.slow
def test_in_8_bits_several_devices_differ_only_by_the_tiles_along_tokens():
    """Rows are quantised by themselves: losses, loads and what flows back agree. Weight gradients have tiles along the
    tokens of one device, so they agree as two quantisations of one matrix do."""
    config = model_config(n_layers=1, n_dense_layers=0, mtp=dict(depth=0))

    def run(size, recipe):
        mesh, model = mesh_of(size), Transformer(config, make_ops("reference", recipe))
        variables = place_global(mesh, random_variables(config), P())
        gradients = jax.jit(make_gradients(recipe_of(model, TRAIN, size)))
        batches = place_global(mesh, unequal_batches(), BATCH)
        return jax.device_get(gradients(variables["params"], variables["routing"], batches, KNOBS))

    (one, one_losses), (many, many_losses), (plain, _) = run(1, resolve("fp8")), run(4, resolve("fp8")), run(1, None)
    assert distance(many_losses.main, one_losses.main) < 1e-6
    chex.assert_trees_all_equal(many_losses.load, one_losses.load)
    for path, leaf in jax.tree.leaves_with_path(many):
        expected, name = dict(jax.tree.leaves_with_path(one))[path], path[-1].key
        assert distance(leaf, expected) < (5e-3 if name.endswith("norm") or name == "embed" else 6e-2), path
    assert distance(one["embed"], plain["embed"]) > 5e-2  # the first of these bounds could fail


def test_a_model_without_mtp_steps_on_two_devices_as_on_one():
    """The arrays [D] of MTP have no elements then: as operands of `shard_map` they crashed XLA's compiler."""
    config, results = model_config(n_layers=1, n_dense_layers=0, mtp=dict(depth=0)), []
    for size in (1, 2):
        mesh, recipe = mesh_of(size), recipe_of(transformer(config), TRAIN, size)
        state = jax.device_put(train_state(random_variables(config), TRAIN), shardings(mesh, recipe.specs()))
        batches = place_global(mesh, unequal_batches(), BATCH)
        results.append(jax.device_get(make_train_step(recipe)(state, batches, KNOBS)))
    (one, metrics), (two, of_two) = results
    for leaf, expected in zip(jax.tree.leaves(two.params), jax.tree.leaves(one.params), strict=True):
        assert distance(leaf, expected) < 1e-5
    assert of_two.mtp_loss_D.shape == of_two.mtp_agreement_D.shape == (0,)
    assert np.isfinite(metrics.loss) and distance(of_two.loss, metrics.loss) < 1e-6
    assert np.array_equal(of_two.load_LE, metrics.load_LE)


@pytest.mark.slow
def test_after_fifty_steps_the_replicas_are_equal_bit_for_bit():
    """Routing biases and parameters on all eight devices, fed with different rows at every step."""
    mesh, rng = mesh_of(8), np.random.default_rng(0)
    recipe = recipe_of(transformer(CONFIG), TRAIN, 8)
    state = jax.device_put(train_state(random_variables(CONFIG), TRAIN), shardings(mesh, recipe.specs()))
    start = jax.device_get(state.routing)
    step = make_train_step(recipe)
    for _ in range(50):
        batch = random_batch(CONFIG, batch=8, seed=int(rng.integers(1 << 30)))
        state, _ = step(state, place_global(mesh, jax.tree.map(lambda a: a[None], batch), BATCH), KNOBS)
    check_replicas(mesh, {"params": state.params, "routing": state.routing})
    for leaf, before in zip(jax.tree.leaves(state.routing), jax.tree.leaves(start), strict=True):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 8 and all(np.array_equal(copy, copies[0]) for copy in copies)
        assert np.abs(copies[0] - before).max() > 0.05


def test_moments_are_divided_and_parameters_are_not():
    """ZeRO-1: every device holds an eighth of each moment whose shape allows it, from the first step on."""
    mesh = mesh_of(8)
    recipe = recipe_of(transformer(CONFIG), TRAIN, 8)
    state = make_init(recipe)(0)
    step = make_train_step(recipe)
    batches = jax.tree.map(lambda a: a[:1], unequal_batches())
    after, _ = step(state, place_global(mesh, batches, BATCH), KNOBS)
    moments = next(part for part in after.opt_state if hasattr(part, "mu"))
    divided = 0
    for params, mu, nu in zip(*map(jax.tree.leaves, (after.params, moments.mu, moments.nu)), strict=True):
        assert params.sharding.is_fully_replicated
        local = {mu.addressable_shards[0].data.size, nu.addressable_shards[0].data.size}
        if any(length % 8 == 0 for length in params.shape):
            assert local == {params.size // 8}
            divided += params.size
        else:
            assert local == {params.size}
    assert divided > 0.5 * sum(leaf.size for leaf in jax.tree.leaves(after.params))
    abstract = abstract_state(recipe)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, abstract)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), after, abstract))


@pytest.mark.parametrize("spec, shape, axis", [
    (P(), (24, 40), 1), (P(), (64, 40), 0), (P(), (3, 7), None), (P(), (), None), (P(None, "x"), (8, 64), 0),
    (P(), (2, 8, 16), 2),
])
def test_zero_takes_the_longest_divisible_axis_that_is_free(spec, shape, axis):
    assert zero_axis(spec, shape, 8) == axis
    expected = spec if axis is None else P(*("data" if i == axis else (*spec, None, None, None)[i]
                                             for i in range(len(shape))))
    assert zero_spec(spec, shape, 8) == expected


def test_every_parameter_names_axes_that_the_table_knows():
    """Flax replicates an axis without a rule and says nothing, so a new name must be entered there."""
    known = {name for name, _ in RULES}
    config = model_config()  # with layers of every kind
    boxed = jax.eval_shape(transformer(config).init, jax.random.key(0), random_batch(config))["params"]
    boxes = jax.tree.leaves(boxed, is_leaf=lambda leaf: hasattr(leaf, "names"))
    assert boxes and all(hasattr(box, "names") and len(box.names) == box.value.ndim for box in boxes)
    assert {name for box in boxes for name in box.names} <= known


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="mesh.data is 9, but there are 8 devices"):
        make_mesh(MeshConfig(data=9))


def test_replicas_that_differ_are_seen_through_the_fingerprints():
    mesh = mesh_of(8)
    tree = place_global(mesh, {"w": np.arange(12, dtype=np.float32), "b": np.zeros(3, np.float32)}, P())
    check_replicas(mesh, tree)
    copies = [shard.data for shard in tree["w"].addressable_shards]
    copies[5] = copies[5].at[7].set(jnp.nextafter(copies[5][7], jnp.inf))
    broken = jax.make_array_from_single_device_arrays((12,), tree["w"].sharding, copies)
    found = replica_fingerprints(mesh, {"w": broken})
    assert [row for row in range(8) if not np.array_equal(found[row], found[0])] == [5]
    with pytest.raises(UserError, match=r"replicas disagree: cpu:5 \(process 0\) .* in w;"):
        check_replicas(mesh, tree | {"w": broken})
