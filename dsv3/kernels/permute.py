"""Moving tokens to expert order and back: two gathers forward, two gathers backward, nothing dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3.kernels.grouped_dot import block_starts, padded_rows
from dsv3.kernels.scaled import Tiles


class Plan(NamedTuple):
    """Where every (token, choice) pair sits among the J rows of expert order.

    `row_TK` is its row. `pair_J` is the inverse: the flat pair index t * K + k of a row, or T * K where it is padding.
    `padding_P` are the rows of padding, of which there are J - T * K.
    """

    row_TK: jax.Array
    pair_J: jax.Array
    padding_P: jax.Array


def padding_rows(sizes_E: jax.Array, block: int, n_padding: int) -> jax.Array:
    """Rows without a pair, in order: behind every expert's own rows to the end of its last block, and behind all."""
    padding_E, ends_E = -sizes_E % block, block_starts(sizes_E, block) + sizes_E
    before_E = jnp.cumsum(padding_E) - padding_E
    total = jnp.sum(padding_E)
    # Within an expert's padding the rows go up by one: what is to be added to the padding's own number is constant.
    shift = jnp.append(ends_E - before_E, jnp.sum(sizes_E))
    number_P = jnp.arange(n_padding, dtype=jnp.int32)
    expert_P = jnp.searchsorted(jnp.append(before_E, total), number_P, side="right", method="compare_all") - 1
    return number_P + shift[expert_P]


def make_plan(topk_TK: jax.Array, n_experts: int, block: int) -> tuple[Plan, jax.Array]:
    """Sort pairs by expert (stable, so by token within an expert); returns the plan and the pairs per expert, [E].

    Each expert's rows start at a multiple of `block`. There is a row for every pair whatever the routing, since J
    is the worst case: no capacity, no dropping.
    """
    n_tokens, n_choices = topk_TK.shape
    n_pairs = n_tokens * n_choices
    expert_of_pair = topk_TK.reshape(n_pairs)
    sizes_E = jnp.zeros(n_experts, jnp.int32).at[expert_of_pair].add(1)
    order = jnp.argsort(expert_of_pair, stable=True).astype(jnp.int32)
    expert_of_sorted = expert_of_pair[order]
    rank_in_expert = jnp.arange(n_pairs, dtype=jnp.int32) - (jnp.cumsum(sizes_E) - sizes_E)[expert_of_sorted]
    row_of_sorted = block_starts(sizes_E, block)[expert_of_sorted] + rank_in_expert
    n_rows = padded_rows(n_pairs, n_experts, block)
    row_of_pair = jnp.zeros(n_pairs, jnp.int32).at[order].set(row_of_sorted, unique_indices=True)
    pair_J = jnp.full(n_rows, n_pairs, jnp.int32).at[row_of_sorted].set(order, unique_indices=True)
    padding_P = padding_rows(sizes_E, block, n_rows - n_pairs)
    return Plan(row_of_pair.reshape(n_tokens, n_choices), pair_J, padding_P), sizes_E


def _gather_or_zero(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


def token_of_row(plan: Plan) -> jax.Array:
    """The token of every row, int32 [J]; T where the row is padding."""
    return plan.pair_J // plan.row_TK.shape[1]


def weight_of_row(weights_TK: jax.Array, plan: Plan) -> jax.Array:
    """The gate's weight of every row, [J]; 0 where the row is padding."""
    return _gather_or_zero(weights_TK.reshape(-1), plan.pair_J)


def permute_tiles(tiles_TD: Tiles, plan: Plan) -> Tiles:
    """`permute` of quantised tokens with their scales: [J, D]. Rows of padding are 0, with scale 1.

    There may be more rows than tokens of the plan.
    """
    values = _gather_or_zero(tiles_TD.values[:len(plan.row_TK)], token_of_row(plan))
    return Tiles(values, permute_scales(tiles_TD.scales, plan))


def permute_scales(scales: jax.Array, plan: Plan) -> jax.Array:
    """[D / 128, J], of [D / 128, T or more]."""
    return scales[:, :len(plan.row_TK)].at[:, token_of_row(plan)].get(mode="fill", fill_value=1)


def combine_rows(rows_JD: jax.Array, row_TK: jax.Array, weights_TK: jax.Array | None) -> jax.Array:
    """The sum over k of weights[t, k] * rows[row_TK[t, k]], or without weights; float32 inside, [T, D] as the rows."""
    chosen_TKD = rows_JD[row_TK].astype(jnp.float32)
    y_TD = jnp.sum(chosen_TKD, axis=1) if weights_TK is None else jnp.einsum("tkd,tk->td", chosen_TKD, weights_TK)
    return y_TD.astype(rows_JD.dtype)


@jax.custom_vjp
def permute(x_TD: jax.Array, plan: Plan) -> jax.Array:
    """Copy every token to the rows of its chosen experts: rows_JD, zero where padding."""
    return _gather_or_zero(x_TD, token_of_row(plan))


def _permute_forward(x_TD, plan):
    return permute(x_TD, plan), plan


def _permute_backward(plan, d_rows_JD):
    return combine_rows(d_rows_JD, plan.row_TK, None), None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def unpermute(rows_JD: jax.Array, plan: Plan, weights_TK: jax.Array) -> jax.Array:
    """y_t = sum over k of weights[t, k] * rows[row of (t, k)], summed in float32, in the dtype of the rows."""
    return combine_rows(rows_JD, plan.row_TK, weights_TK)


def _unpermute_forward(rows_JD, plan, weights_TK):
    return unpermute(rows_JD, plan, weights_TK), (rows_JD, plan, weights_TK)


def _unpermute_backward(residuals, d_y_TD):
    rows_JD, plan, weights_TK = residuals
    weight_J = weight_of_row(weights_TK, plan)
    d_y_JD = _gather_or_zero(d_y_TD, token_of_row(plan))
    d_rows_JD = (d_y_JD.astype(jnp.float32) * weight_J[:, None]).astype(rows_JD.dtype)
    d_weights_TK = jnp.einsum(
        "tkd,td->tk", rows_JD[plan.row_TK].astype(jnp.float32), d_y_TD.astype(jnp.float32))
    return d_rows_JD, None, d_weights_TK


unpermute.defvjp(_unpermute_forward, _unpermute_backward)
