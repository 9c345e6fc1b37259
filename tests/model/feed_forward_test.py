"""DeepSeekMoE: dropless under any routing, equal to a loop over experts, the same for every row block."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny_models import FAMILY, distance

from dsv3.model.feed_forward import MoE
from dsv3.model.ops import reference_ops

CONFIG = FAMILY["one_group"]  # top 3 of 8, no group limit


def layer(seed=0, tokens=(2, 12)):
    rng = np.random.default_rng(seed)
    example = jnp.zeros((*tokens, 24)), jnp.ones(tokens, bool)
    shapes = jax.eval_shape(MoE(CONFIG, reference_ops(row_block=4)).init, jax.random.key(0), *example)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32),
                          nn.unbox(shapes["params"]))
    x = jnp.asarray(rng.standard_normal((*tokens, 24)), jnp.float32)
    return params, x


def run(params, x, bias, row_block=4):
    return MoE(CONFIG, reference_ops(row_block=row_block)).apply(
        {"params": params, "routing": {"bias": bias}}, x, jnp.ones(x.shape[:2], bool))


def expected(params, x, bias):
    weights = {name: np.asarray(value, np.float64) for name, value in params.items()}
    flat = np.asarray(x, np.float64).reshape(-1, 24)
    normed = oracle.rms_norm(flat, weights["norm"], CONFIG.norm_eps)
    y, routed = oracle.moe(normed, weights, np.asarray(bias, np.float64), CONFIG.moe, np.ones(len(flat), int))
    return y.reshape(x.shape), routed.load_E


@pytest.mark.parametrize("row_block", [1, 4, 7, 64])
def test_every_row_block_gives_the_loop_over_experts(row_block):
    params, x = layer()
    y, stats = run(params, x, jnp.zeros(8), row_block)
    wanted, load = expected(params, x, np.zeros(8))
    assert distance(y, wanted) < 1e-5
    np.testing.assert_array_equal(stats.load_E, load)


def test_nothing_is_dropped_when_all_tokens_choose_the_same_experts():
    """A bias sends all 24 tokens to experts 2, 5 and 6: three times the mean load and more, and still exact."""
    params, x = layer(1)
    bias = jnp.full(8, -100.0).at[jnp.array([2, 5, 6])].set(100.0)
    y, stats = run(params, x, bias)
    assert stats.load_E.tolist() == [0, 0, 24, 0, 0, 24, 24, 0]
    assert distance(y, expected(params, x, bias)[0]) < 1e-5


def test_every_expert_that_was_chosen_gets_a_gradient_and_no_other():
    params, x = layer(2)
    bias = jnp.full(8, -100.0).at[jnp.array([0, 3, 7])].set(100.0)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(run(p, x, bias)[0])))(params)
    size = np.abs(np.asarray(grads["experts_down"])).sum(axis=(1, 2))
    assert (size > 0).tolist() == [True, False, False, True, False, False, False, True]


def test_a_token_is_not_changed_by_the_company_it_keeps():
    """Rows are sorted, padded and batched by expert; none of that may leak between tokens."""
    params, x = layer(3)
    together, _ = run(params, x, jnp.zeros(8))
    alone = jnp.concatenate([run(params, x[:, t:t + 1], jnp.zeros(8))[0] for t in range(0, 12, 5)], axis=1)
    assert distance(together[:, ::5], alone) < 1e-5
