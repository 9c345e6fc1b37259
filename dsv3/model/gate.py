"""Routing: which experts a token visits, and with what weight (report section 2.1.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3.config import MoEConfig
from dsv3.kernels.dot import dot_float32


class Routes(NamedTuple):
    """The chosen experts of every token and their gate weights (float32)."""

    topk_TK: jax.Array
    weights_TK: jax.Array


def scores(x_TD: jax.Array, w_DE: jax.Array, config: MoEConfig) -> jax.Array:
    """Affinity of every token for every expert, float32 whatever the model's dtype."""
    logits_TE = dot_float32(x_TD, w_DE)
    return jax.nn.sigmoid(logits_TE) if config.score_func == "sigmoid" else jax.nn.softmax(logits_TE, axis=-1)


def limit_groups(selection_TE: jax.Array, config: MoEConfig) -> jax.Array:
    """Node-limited routing: -inf outside the best `n_limited_groups` groups of experts.

    A group's score is the sum of its two best biased scores (V3), or its best score without a bias (V2). The fill is
    -inf, not 0: a biased score can be negative, and 0 would then beat it.
    """
    grouped_TGE = selection_TE.reshape(len(selection_TE), config.n_expert_groups, config.experts_per_group)
    if config.selection_bias:
        group_TG = jnp.sum(jax.lax.top_k(grouped_TGE, 2)[0], axis=-1)
    else:
        group_TG = jnp.max(grouped_TGE, axis=-1)
    kept_TM = jax.lax.top_k(group_TG, config.n_limited_groups)[1]
    allowed_TG = jnp.any(kept_TM[:, :, None] == jnp.arange(config.n_expert_groups)[None, None], axis=1)
    return jnp.where(allowed_TG[:, :, None], grouped_TGE, -jnp.inf).reshape(selection_TE.shape)


def route(scores_TE: jax.Array, bias_E: jax.Array | None, config: MoEConfig) -> Routes:
    """Choose by biased scores, weigh by unbiased ones (equation 16): the bias moves traffic, never the output."""
    selection_TE = jax.lax.stop_gradient(scores_TE)
    if bias_E is not None:
        selection_TE = selection_TE + bias_E[None]
    if config.n_limited_groups < config.n_expert_groups:
        selection_TE = limit_groups(selection_TE, config)
    topk_TK = checkpoint_name(jax.lax.top_k(selection_TE, config.n_activated_experts)[1], "moe.routes")
    weights_TK = jnp.take_along_axis(scores_TE, topk_TK, axis=1)
    if config.norm_topk_prob:
        weights_TK /= jnp.sum(weights_TK, axis=1, keepdims=True) + 1e-20
    return Routes(topk_TK, weights_TK * config.route_scale)


def expert_counts(topk_TK: jax.Array, valid_T: jax.Array, n_experts: int) -> jax.Array:
    """How many (token, choice) pairs of valid tokens every expert gets, int32 [E]."""
    return jnp.zeros(n_experts, jnp.int32).at[topk_TK].add(valid_T.astype(jnp.int32)[:, None])


def balance_loss(scores_BTE: jax.Array, valid_BT: jax.Array, config: MoEConfig) -> jax.Array:
    """Sequence-wise balance loss without its alpha (equations 17 to 20), summed over the sequences of the batch.

    L = sum over experts of f_i P_i, where f_i counts plain top-K choices of the *unbiased* scores, scaled so that an
    even load gives 1, and P_i is the mean normalised score. Padding counts in neither.
    """
    topk_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), config.n_activated_experts)[1]
    counts_BE = jax.vmap(expert_counts, in_axes=(0, 0, None))(topk_BTK, valid_BT, config.n_routed_experts)
    length_B = jnp.maximum(jnp.sum(valid_BT, axis=1), 1)
    counts_BE = checkpoint_name(counts_BE, "moe.routes")
    f_BE = counts_BE * (config.n_routed_experts / config.n_activated_experts) / length_B[:, None]
    normalised_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
    p_BE = jnp.sum(normalised_BTE * valid_BT[:, :, None], axis=1) / length_B[:, None]
    return jnp.sum(f_BE * p_BE)
