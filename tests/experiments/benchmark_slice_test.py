"""The slice of V3: its floor, its load, and that its gradients are those of training."""

import dataclasses
import json
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import distance

from dsv3.config import UserError
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import make_mesh
from dsv3.train import step
from dsv3.train.optimizer import adamw
from experiments.benchmark_slice import (
    DRAWS,
    SKEW,
    expert_draws,
    floor_microseconds,
    load_skew,
    make_gradients,
    make_inputs,
    make_update,
    measure,
    per_token_and_layer,
    slice_config,
    with_draws,
)

SMALL = (
    "kernels=reference", "model.dtype=float32", "model.dim=32", "model.vocab_size=256", "model.n_layers=1",
    "model.scan_unroll=1", "model.attention.n_heads=2", "model.attention.q_lora_rank=16",
    "model.attention.kv_lora_rank=16", "model.attention.qk_nope_head_dim=8", "model.attention.qk_rope_head_dim=4",
    "model.attention.v_head_dim=8", "model.moe.moe_inter_dim=16", "train.seq_len=32", "data.eval_stride=32",
)


def test_the_slice_is_v3_with_four_layers_and_the_floor_of_the_notes():
    config = slice_config([])
    model = config.model
    assert (model.dim, model.attention.n_heads, model.moe.moe_inter_dim, model.n_moe_layers) == (7168, 128, 2048, 4)
    assert config.train.micro_batch_size * config.train.seq_len == 16_384
    assert floor_microseconds(model, 4096) == pytest.approx(1.77 + 0.61, abs=0.005)
    assert slice_config(["train.micro_batch_size=2"]).train.micro_batch_size == 2
    with pytest.raises(UserError, match="given twice"):
        slice_config(["model.n_layers=1", "model.n_layers=3"])


def test_draws_are_skewed_and_repeat_experts():
    draws = expert_draws(3, 4096, 8, 8)
    assert draws.shape == (3, 4096, 8) and draws.min() == 0 and draws.max() == 7
    assert 1 + SKEW - 0.05 < load_skew(draws, 8) < 1 + SKEW + 0.05
    distinct = np.mean([len(set(token)) for token in draws[0]])
    assert 4.5 < distinct < 5.5, "eight draws of eight with repetition meet 5.2 experts"
    fullest = [np.argmax(np.bincount(draw.ravel())) for draw in draws]
    assert len(set(fullest)) > 1


def test_rows_follow_a_draw_that_the_router_picks():
    seen, ops = [], reference_ops()
    recorded = dataclasses.replace(ops, moe=lambda x, topk, *rest: seen.append((topk, rest)))
    recorded = dataclasses.replace(recorded, layers=(recorded, ops, recorded))
    draws = jnp.arange(3 * 5 * 2).reshape(3, 5, 2)
    for first in range(4):
        router = jnp.zeros((5, 2), jnp.int32).at[2, 0].set(first)
        drawn = with_draws(recorded, draws)
        assert drawn.of_layer(0) is drawn.of_layer(2) != drawn.of_layer(1)
        for bundle in (drawn, drawn.of_layer(0)):
            seen.clear()
            bundle.moe(None, router, 8)
            np.testing.assert_array_equal(seen[-1][0], draws[first % 3])
            assert seen[-1][1] == (8,)


@cache
def small():
    config, ops = slice_config(SMALL), reference_ops()
    return config, ops, make_inputs(config, ops)


@pytest.mark.slow
def test_gradients_are_those_of_training_where_every_token_goes_everywhere():
    """Top 8 of 8: the router's choice is a permutation, so a draw that is one too gives the trainer's own gradients."""
    config, ops, inputs = small()
    n_tokens = inputs.draws.shape[2]
    everywhere = jnp.broadcast_to(jnp.arange(8), (1, DRAWS, n_tokens, 8))
    uniform = dataclasses.replace(config.model.moe, score_func="softmax", norm_topk_prob=True)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=uniform))
    equal = lambda path, p: jnp.zeros_like(p) if path[-1].key == "gate" else p  # one weight, whatever the order
    inputs = inputs._replace(params=jax.tree.map_with_path(equal, inputs.params))
    ours = jax.jit(make_gradients(config, ops))(*inputs._replace(draws=everywhere))

    recipe = step.make_recipe(Transformer(config.model, ops), config.train, False, make_mesh(config.mesh))
    knobs = step.Knobs(*(jnp.float32(x) for x in (0, 0, 0, config.train.balance_alpha)))
    grads, losses = jax.jit(step.make_gradients(recipe))(inputs.params, inputs.routing, inputs.batches, knobs)
    assert distance(ours.loss, losses.main / losses.tokens) < 1e-6
    for actual, expected in zip(jax.tree.leaves(ours.grads), jax.tree.leaves(grads), strict=True):
        assert distance(actual, expected) < 2e-5 or not np.any(expected)


@pytest.mark.slow
def test_micro_batches_add_up():
    config, ops, inputs = small()
    parts = slice_config([*SMALL, "train.micro_batch_size=1"])
    split = lambda x: x.reshape(4, 1, *x.shape[2:])
    draws = inputs.draws[:, :1]  # one draw: the router of a micro-batch would pick another
    whole = jax.jit(make_gradients(config, ops))(*inputs._replace(draws=draws))
    halved = jax.jit(make_gradients(parts, ops))(*inputs._replace(
        batches=jax.tree.map(split, inputs.batches), draws=draws.reshape(4, 1, -1, 8)))
    assert distance(whole.loss, halved.loss) < 1e-6
    for actual, expected in zip(jax.tree.leaves(halved.grads), jax.tree.leaves(whole.grads), strict=True):
        assert distance(actual, expected) < 1e-5


@pytest.mark.slow
def test_the_draw_decides_the_load_that_experts_see():
    """Sent to one expert alone, the other seven get no gradient; the router's own load is reported all the same."""
    config, ops, inputs = small()
    one = jnp.full_like(inputs.draws, 5)
    grads = jax.jit(make_gradients(config, ops))(*inputs._replace(draws=one))
    down = grads.grads["moe_layers"]["moe"]["experts_down"]
    assert [bool(jnp.any(down[:, expert])) for expert in range(8)] == [expert == 5 for expert in range(8)]
    assert jnp.all(grads.load["moe_layers"] == inputs.batches.tokens_BT.size)


@pytest.mark.slow
def test_the_update_is_that_of_training_and_keeps_the_old_on_bad_numbers():
    config, _, inputs = small()
    state = jax.jit(adamw(config.train.optimizer).init)(inputs.params)
    grads = jax.tree.map(lambda p: 0.01 * jnp.sign(p) + 0.001, inputs.params)
    update = jax.jit(make_update(config))
    params, new_state = update(inputs.params, state, grads)
    updates, expected_state = jax.jit(adamw(config.train.optimizer).update)(grads, state, inputs.params)
    chex.assert_trees_all_close(new_state, expected_state, rtol=1e-6)
    chex.assert_trees_all_close(params, jax.tree.map(lambda p, u: p - 1e-6 * u, inputs.params, updates), rtol=1e-6)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), grads)
    chex.assert_trees_all_equal(update(inputs.params, state, bad), (inputs.params, state))


def test_figures_follow_from_seconds():
    config = slice_config([])
    times = {"gradient_seconds": 0.2, "optimizer_seconds": 0.02, "breakdown_seconds": {"idle": 0.065536}}
    figures = per_token_and_layer(config, times)
    assert figures["gradient_us"] == pytest.approx(0.2e6 / 65_536)
    assert figures["total_us"] == pytest.approx(0.22e6 / 65_536) and figures["breakdown_us"]["idle"] == pytest.approx(1)
    assert figures["tokens_per_second"] == pytest.approx(16_384 / 0.22)
    # 583.5M multiply-adds of matrices, 84M of the causal core, a little router and head: three times two of each.
    assert 1e12 * figures["tflops"] * 0.2 / 65_536 == pytest.approx(6 * (583.52e6 + 83.9e6), rel=0.005)


@pytest.mark.slow
def test_the_whole_command_runs_small(monkeypatch, tmp_path):
    config = slice_config([*SMALL, "train.micro_batch_size=2"])
    figures = measure(config, 2, str(tmp_path))
    json.dumps(figures)
    assert figures["micro_batches"] == 2 and figures["loss"] == pytest.approx(np.log(256), rel=0.05)
    assert figures["breakdown_us"].keys() >= {"grouped products", "router, dispatch and combine", "idle"}
    assert figures["gradient_us"] > 0 and figures["optimizer_us"] > 0
