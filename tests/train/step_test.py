"""The training step: accumulation, normalisation, and the update of the routing bias."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    distance,
    model_config,
    random_batch,
    random_variables,
    recipe_of,
    train_config,
    train_state,
    transformer,
)

from dsv3.model.batch import Batch
from dsv3.parallel.balance import update_routing
from dsv3.train.step import Knobs, make_gradients, make_train_step

CONFIG = model_config(n_layers=1, n_dense_layers=0)  # one MoE layer and one MTP module
TRAIN = train_config()
KNOBS = Knobs(*map(jnp.float32, (1e-2, 0.01, 0.3, 1e-2)))


def fresh_state():
    return train_state(random_variables(CONFIG), TRAIN)


def step_of(model, train):
    return make_train_step(recipe_of(model, train))


@pytest.fixture(scope="module")
def step():
    return step_of(transformer(CONFIG), TRAIN)


def uneven_batch():
    """Four rows with 12, 8, 5 and 1 counted tokens: micro-batches of very different weight."""
    batch = random_batch(CONFIG, batch=4)
    length = jnp.array([12, 8, 5, 1])[:, None]
    valid = jnp.arange(12)[None] < length
    return batch._replace(weights_BT=valid.astype(jnp.float32), segment_ids_BT=valid.astype(jnp.int32))


def split(batch: Batch, n_micro: int) -> Batch:
    return jax.tree.map(lambda a: a.reshape(n_micro, -1, *a.shape[1:]), batch)


def test_micro_batches_give_the_step_of_the_whole_batch(step):
    """However unevenly tokens are spread: gradients are normalised by global counts, loads summed before the sign."""
    results = [step(fresh_state(), split(uneven_batch(), n), KNOBS) for n in (1, 4)]
    (whole, metrics), others = results[0], results[1:]
    for state, other_metrics in others:
        chex.assert_trees_all_equal(state.routing, whole.routing)
        np.testing.assert_array_equal(other_metrics.load_LE, metrics.load_LE)
        np.testing.assert_allclose(other_metrics.loss, metrics.loss, rtol=1e-5)
        np.testing.assert_allclose(other_metrics.gradient_norm, metrics.gradient_norm, rtol=1e-4)
        np.testing.assert_allclose(other_metrics.mtp_agreement_D, metrics.mtp_agreement_D)
        mu = [jax.tree.leaves(s.opt_state)[1] for s in (state, whole)]
        assert distance(mu[0], mu[1]) < 1e-4


def test_the_bias_update_is_that_of_the_global_load_mtp_included(step):
    before = fresh_state()
    routing = jax.tree.map(jnp.copy, before.routing)
    after, metrics = step(before, split(uneven_batch(), 4), KNOBS)
    load = {"moe_layers": metrics.load_LE[:1], "mtp_0": metrics.load_LE[1]}
    chex.assert_trees_all_close(after.routing, update_routing(routing, load, 0.01), rtol=1e-6)
    assert metrics.load_LE.sum(axis=1).tolist() == [26 * 3] * 2
    assert float(jnp.abs(after.routing["mtp_0"]["block"]["moe"]["bias"]
                         - routing["mtp_0"]["block"]["moe"]["bias"]).sum()) > 0


def test_a_bias_speed_of_zero_freezes_the_biases(step):
    before = fresh_state()
    routing = jax.tree.map(jnp.copy, before.routing)
    after, _ = step(before, split(uneven_batch(), 1), KNOBS._replace(bias_update_speed=jnp.float32(0)))
    chex.assert_trees_all_equal(after.routing, routing)


def test_weight_decay_never_touches_the_routing_bias(step):
    """With a learning rate and decay that shrink every matrix, biases move by exactly the speed or not at all."""
    before = fresh_state()
    routing = jax.tree.map(jnp.copy, before.routing)
    after, _ = step(before, split(uneven_batch(), 1), KNOBS._replace(learning_rate=jnp.float32(1.0)))
    for new, old in zip(jax.tree.leaves(after.routing), jax.tree.leaves(routing), strict=True):
        moved = np.abs(np.asarray(new - old))
        assert np.all((moved < 1e-7) | (np.abs(moved - 0.01) < 1e-6))


def test_schedules_do_not_recompile(step):
    step(fresh_state(), split(uneven_batch(), 4), KNOBS)
    compiled = step._cache_size()
    for rate in (1e-3, 2e-3, 3e-3):
        step(fresh_state(), split(uneven_batch(), 4), KNOBS._replace(learning_rate=jnp.float32(rate)))
    assert step._cache_size() == compiled


def test_twenty_steps_learn_one_batch(step):
    """Overfitting one batch: next-token and MTP losses fall well below that of a uniform guess."""
    state, batches = fresh_state(), split(uneven_batch(), 1)
    first = None
    for _ in range(40):
        state, metrics = step(state, batches, KNOBS)
        first = first or metrics
    assert metrics.loss < 0.35 * first.loss
    assert metrics.mtp_loss_D[0] < 0.5 * first.mtp_loss_D[0]


def test_mtp_lambda_zero_leaves_the_mtp_module_without_gradient():
    """Its weights then move by weight decay alone, which is off here."""
    train = dataclasses.replace(TRAIN, optimizer=dataclasses.replace(TRAIN.optimizer, weight_decay=0.0))
    before = fresh_state()
    params = jax.tree.map(jnp.copy, before.params)
    after, _ = step_of(transformer(CONFIG), train)(
        before, split(uneven_batch(), 1), KNOBS._replace(mtp_lambda=jnp.float32(0), balance_alpha=jnp.float32(0)))
    chex.assert_trees_all_equal(after.params["mtp_0"], params["mtp_0"])
    assert distance(after.params["head"], params["head"]) > 1e-4


def test_the_objective_is_main_plus_lambda_over_depths_plus_alpha_balance():
    """Equation 25 written out at depth two: the step's gradient is that of this sum."""
    config = model_config(n_layers=1, n_dense_layers=0, mtp=dict(depth=2))
    model, variables, batch = transformer(config), random_variables(config), uneven_batch()

    def objective(params):
        losses = model.apply({**variables, "params": params}, batch)
        mtp = 0.3 / 2 * (losses.mtp_D[0] + losses.mtp_D[1]) / 26
        return losses.main / 26 + mtp + TRAIN.balance_alpha * losses.balance / 4

    expected = jax.jit(jax.grad(objective))(variables["params"])
    gradients, _ = jax.jit(make_gradients(recipe_of(model, TRAIN)))(
        variables["params"], variables["routing"], split(batch, 1), KNOBS)
    for actual, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert distance(actual, wanted) < 1e-4
