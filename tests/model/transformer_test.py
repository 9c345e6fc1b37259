"""The whole model: one parameter tree, named recomputation, depth-independent compilation, no array of all logits."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILY, distance, model_config, random_batch, random_variables, transformer

from dsv3.config import resolve
from dsv3.model.batch import Batch
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.ops import make_ops

POLICIES = ("none", "report", "full")


def with_remat(policy, **changes):
    return dataclasses.replace(FAMILY["v3"], remat=policy, **changes)


def gradient(config):
    """Jitted: (params, routing, batch) -> gradient of all losses, Losses."""
    model = transformer(config)

    def loss(params, routing, batch):
        losses = model.apply({"params": params, "routing": routing}, batch)
        return losses.main + jnp.sum(losses.mtp_D) + losses.balance, losses

    return jax.jit(jax.grad(loss, has_aux=True))


def lowered_gradient(config, batch):
    shapes = nn.unbox(jax.eval_shape(transformer(config).init, jax.random.key(0), batch))
    return gradient(config).lower(shapes["params"], shapes["routing"], batch)


def test_parameter_tree_gradients_and_loads_are_the_same_under_every_policy():
    batch = random_batch(FAMILY["v3"])
    variables = random_variables(FAMILY["v3"])
    shapes, results = [], []
    for policy in POLICIES:
        config = with_remat(policy)
        shapes.append(jax.eval_shape(transformer(config).init, jax.random.key(0), batch))
        results.append(gradient(config)(variables["params"], variables["routing"], batch))
    chex.assert_trees_all_equal_shapes_and_dtypes(*shapes)
    for grads, losses in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, results[0][0])
        chex.assert_trees_all_equal(losses.load, results[0][1].load)
    pairs = int(np.sum(np.asarray(batch.segment_ids_BT) > 0)) * FAMILY["v3"].moe.n_activated_experts
    assert {int(jnp.sum(load)) for load in results[1][1].load.values()} == {pairs, 2 * pairs}


@pytest.mark.slow
def test_unrolling_the_scan_changes_neither_parameters_nor_gradients():
    """Three MoE layers one at a time, in pairs (which does not divide them), and all at once."""
    configs = [model_config(n_layers=3, n_dense_layers=0, mtp=dict(depth=0), scan_unroll=n) for n in (1, 2, 100)]
    batch, variables = random_batch(configs[0]), random_variables(configs[0])
    results = [gradient(config)(variables["params"], variables["routing"], batch) for config in configs]
    for grads, losses in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, results[0][0])
        chex.assert_trees_all_equal(losses.load, results[0][1].load)


def test_recomputation_saves_memory_in_the_order_of_its_policies():
    """At shapes where activations dominate, the compiled gradient's temporary memory falls from none to full."""
    sizes = {}
    for policy in POLICIES:
        config = model_config(remat=policy, n_layers=6, n_dense_layers=0, mtp=dict(depth=0), dim=64)
        batch = random_batch(config, batch=4, length=64)
        sizes[policy] = lowered_gradient(config, batch).compile().memory_analysis().temp_size_in_bytes
    assert sizes["none"] > 1.3 * sizes["report"] > 1.3 * sizes["full"]


def test_program_size_does_not_grow_with_depth():
    """Layers of one kind are one scan: 3 and 30 MoE layers lower to the same program within one percent."""
    sizes = []
    for depth in (3, 30):
        config = model_config(n_layers=1 + depth)
        sizes.append(len(lowered_gradient(config, random_batch(config)).as_text().splitlines()))
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]


def test_no_array_holds_all_logits():
    """With 64 tokens, chunks of 8 and 1024 words, the training program has no array of 64 x 1024."""
    config = model_config(vocab_size=1024)
    batch = random_batch(config, batch=2, length=32)
    program = lowered_gradient(config, batch).as_text()
    assert "tensor<8x1024xf32>" in program
    assert "64x1024" not in program and "2x32x1024" not in program


@pytest.mark.parametrize("name", ["v3", "v2_greedy"])
def test_initial_values(name):
    """Matrices have the configured standard deviation, gains are one, biases zero."""
    config = dataclasses.replace(FAMILY[name], init_std=0.006)
    variables = nn.unbox(jax.jit(transformer(config).init)(jax.random.key(0), random_batch(config)))
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        assert leaf.dtype == jnp.float32
        if path[-1].key.endswith("norm"):
            assert np.all(np.asarray(leaf) == 1)
        else:
            assert 0.006 * 0.8 < float(jnp.std(leaf)) < 0.006 * 1.2, path
    assert all(np.all(np.asarray(bias) == 0) for bias in jax.tree.leaves(variables.get("routing", {})))


def test_layers_are_initialised_differently():
    variables = nn.unbox(jax.jit(transformer(FAMILY["v3"]).init)(jax.random.key(0), random_batch(FAMILY["v3"])))
    kv_a = variables["params"]["moe_layers"]["attn"]["kv_a"]
    assert distance(kv_a[0], kv_a[1]) > 0.5


def test_the_selection_bias_is_no_parameter():
    variables = nn.unbox(
        jax.eval_shape(transformer(FAMILY["v3"]).init, jax.random.key(0), random_batch(FAMILY["v3"])))
    names = [path[-1].key for path, _ in jax.tree.leaves_with_path(variables["params"])]
    assert "bias" not in names
    assert jax.tree.map(jnp.shape, variables["routing"]) == {
        "moe_layers": {"moe": {"bias": (2, 8)}}, "mtp_0": {"block": {"moe": {"bias": (8,)}}}}


def test_a_bfloat16_model_stays_near_its_float32_twin():
    config = FAMILY["v3"]
    variables, batch = random_variables(config), random_batch(config)
    exact, _ = transformer(config).apply(variables, batch, method="forward")
    rounded, _ = transformer(dataclasses.replace(config, dtype="bfloat16")).apply(variables, batch, method="forward")
    assert rounded.dtype == jnp.float32
    assert 1e-4 < distance(rounded, exact) < 0.2


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
@pytest.mark.parametrize("batch, length", [(0, 12), (2, 0)])
def test_no_tokens_cost_nothing_and_move_nothing(batch, length, recipe):
    """Losses and gradients of zero, not NaN, and logits of the right shape."""
    config = FAMILY["v3"]
    model, variables = Transformer(config, make_ops("reference", resolve(recipe))), random_variables(config)
    empty = Batch(*(jnp.zeros((batch, length), array.dtype) for array in random_batch(config)))

    def total(params):
        losses = model.apply(variables | {"params": params}, empty)
        return losses.main + jnp.sum(losses.mtp_D) + losses.balance, losses

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total, has_aux=True))(variables["params"])):
        assert not np.any(leaf)
    main, ahead = jax.eval_shape(lambda: model.apply(variables, empty, method="forward"))
    assert main.shape == ahead[0].shape == (batch, length, config.vocab_size)


def test_sites_reach_the_bundle_by_name():
    """Every product names its place, so that a recipe can give each its own format."""
    seen = []
    reference = reference_ops(row_block=4, loss_chunk=8)

    def recording(function):
        def call(*args, **kwargs):
            seen.extend([args[0]] if isinstance(args[0], str) else args[0])
            return function(*args, **kwargs)
        return call

    ops = dataclasses.replace(
        reference, **{name: recording(getattr(reference, name)) for name in
                      ("linear", "norm_linear", "attention_linear", "mlp")})
    jax.eval_shape(Transformer(FAMILY["v3"], ops).init, jax.random.key(0), random_batch(FAMILY["v3"]))
    assert set(seen) == {
        "attn.q_a", "attn.q_b", "attn.kv_a", "attn.kv_b", "attn.o", "mlp.gate_up", "mlp.down",
        "shared.gate_up", "shared.down", "mtp.eh_proj"}
