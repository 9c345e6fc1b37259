"""SwiGLU networks in 8 bits, forward and backward as one operation each: a dense one, and the routed experts.

The input of SwiGLU waits quantised, its output is computed again (section 3.3.3); the gradient of that input exists
only quantised, as both of its products read it.
"""

from functools import partial
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3.config import Operand
from dsv3.kernels.permute import Plan, make_plan, permute, weight_of_row
from dsv3.kernels.quantized_dot import (
    Linear,
    Width,
    expert_rows,
    experts_of,
    input_gradient,
    quantize_input,
    quantize_weights,
    wait,
    wgrad_input,
)
from dsv3.kernels.scaled import TILE, Tiles, unpack_tiles
from dsv3.model.ops import ExpertWeights


class FeedForward(NamedTuple):
    """Both Linears of a SwiGLU network, and what its input waits in (None: the model dtype)."""

    up: Linear
    down: Linear
    kept: Operand | None

    def activate(self, gate_up: jax.Array) -> tuple[Tiles, Tiles | jax.Array]:
        """h as the second product reads it, and gate_up as it waits."""
        h, kept = self.up.kernels.swiglu_quantize(gate_up, self.down.rule.fprop_x, self.kept)
        if self.kept is None:
            return h, checkpoint_name(kept, f"{self.down.site}.input")
        return h, wait(kept, self.kept, self.down.site)

    def activate_backward(
        self, waiting: Tiles | jax.Array, d_h: jax.Array, weight: jax.Array | None,
    ) -> tuple[Tiles, Tiles, Tiles, jax.Array | None]:
        kept = waiting if self.kept is None else unpack_tiles(waiting, self.kept)
        return self.up.kernels.swiglu_backward_quantize(
            kept, d_h, weight, self.up.rule.dgrad_dy, self.up.rule.wgrad_dy, self.down.rule.wgrad_x)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def mlp(x_MD: jax.Array, w_up: jax.Array, w_down: jax.Array, ff: FeedForward) -> jax.Array:
    """swiglu(x @ w_up) @ w_down, w_up [D, 2F] and w_down [F, D]."""
    return _mlp_forward(x_MD, w_up, w_down, ff)[0]


def _mlp_forward(x_MD, w_up, w_down, ff):
    m = len(x_MD)
    rows, waiting = quantize_input(x_MD, ff.up)
    (up, up_dgrad), (down, down_dgrad) = quantize_weights(w_up, ff.up), quantize_weights(w_down, ff.down)
    gate_up_MF = ff.up.products.dot(rows, up, (m, w_up.shape[1]), x_MD.dtype)
    h, kept = ff.activate(gate_up_MF)
    y_MD = ff.down.products.dot(h, down, (m, w_down.shape[1]), x_MD.dtype)
    return y_MD, (waiting, kept, up_dgrad, down_dgrad, Width(x_MD.shape[1]), Width(len(w_down)))


def _mlp_backward(ff, residuals, d_y_MD):
    waiting, kept, up_dgrad, down_dgrad, d, f = residuals
    d_h_MF, d_y_columns = input_gradient(d_y_MD, down_dgrad, f, ff.down)
    rows, columns, h_columns, _ = ff.activate_backward(kept, d_h_MF, None)
    d_x_MD = ff.up.products.dot(rows, up_dgrad, (len(d_y_MD), d), d_y_MD.dtype)
    d_w_up = ff.up.products.weight_gradient(wgrad_input(waiting, ff.up), columns)
    d_w_down = ff.down.products.weight_gradient(h_columns, d_y_columns)
    return d_x_MD, d_w_up[:d, :2 * f], d_w_down[:f, :d_y_MD.shape[1]]


mlp.defvjp(_mlp_forward, _mlp_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def moe(
    h_TD: jax.Array, topk_TK: jax.Array, weights_TK: jax.Array, weights: ExpertWeights, ff: FeedForward,
) -> jax.Array:
    """The routed experts: tokens are quantised once and travel in 8 bits, both ways; they are combined in their dtype.

    Backward, the gradient of a token travels unweighted, and the gate's weight joins at the SwiGLU of its row.
    """
    return _moe_forward(h_TD, topk_TK, weights_TK, weights, ff)[0]


def _moe_forward(h_TD, topk_TK, weights_TK, weights, ff):
    kernels, dtype = ff.up.kernels, h_TD.dtype
    (_, d, f2), n_experts = weights.gate_up_EDF.shape, len(weights.gate_up_EDF)
    with jax.named_scope("dispatch"):
        plan, sizes_E = checkpoint_name(make_plan(topk_TK, n_experts, TILE), "moe.plan")
        rows, waiting = _travel(h_TD, plan, ff.up)
    with jax.named_scope("experts"):
        expert_Z = experts_of(sizes_E, len(plan.pair_J))
        (up, up_dgrad), (down, down_dgrad) = map(quantize_weights, weights, (ff.up, ff.down))
        gate_up_JF = ff.up.products.grouped_dot(rows, up, expert_Z, dtype)[:, :f2]
        h, kept = ff.activate(gate_up_JF)
        out_JD = ff.down.products.grouped_dot(h, down, expert_Z, dtype)
    with jax.named_scope("combine"):  # of whole tiles, as kernels want them; the columns of padding go after
        y_TD = kernels.combine_rows(out_JD, plan.row_TK, weights_TK)[:, :d]
    return y_TD, (waiting, kept, up_dgrad, down_dgrad, plan, sizes_E, weights_TK, Width(f2 // 2))


def _travel(h_TD: jax.Array, plan: Plan, up: Linear) -> tuple[Tiles, Tiles | jax.Array]:
    """Rows of quantised tokens, and what waits for the weight gradient: tokens, of which there are fewer than rows.

    Where the rule keeps nothing (`kept` None), the weight gradient's operand is made from the tokens themselves.
    """
    tokens = up.kernels.quantize_rows(h_TD, up.rule.fprop_x)
    if up.rule.kept is None:
        waiting = checkpoint_name(h_TD, f"{up.site}.input")
    else:
        kept = tokens if up.rule.kept == up.rule.fprop_x else up.kernels.quantize_rows(h_TD, up.rule.kept)
        waiting = wait(kept, up.rule.kept, up.site)
    return up.kernels.permute_tiles(tokens, plan), waiting


def _rows_for_wgrad(waiting: Tiles | jax.Array, plan: Plan, up: Linear) -> Tiles:
    if up.rule.kept is None:
        return up.kernels.quantize_columns(permute(waiting, plan), up.rule.wgrad_x)
    rows = up.kernels.permute_tiles(unpack_tiles(waiting, up.rule.kept), plan)
    return up.kernels.requantize_columns(rows, up.rule.wgrad_x)


def _moe_backward(ff, residuals, d_y_TD):
    waiting, kept, up_dgrad, down_dgrad, plan, sizes_E, weights_TK, f = residuals
    kernels, dtype, d = ff.up.kernels, d_y_TD.dtype, d_y_TD.shape[1]
    with jax.named_scope("dispatch"):
        tokens = kernels.quantize_rows(d_y_TD, ff.down.rule.dgrad_dy)
        d_y_rows = kernels.permute_tiles(tokens, plan)
        weight_J = weight_of_row(weights_TK, plan)
        rows_columns = _rows_for_wgrad(waiting, plan, ff.up)
    with jax.named_scope("experts"):
        expert_Z, extent = experts_of(sizes_E, len(plan.pair_J)), expert_rows(sizes_E)
        d_h_JF = ff.down.products.grouped_dot(d_y_rows, down_dgrad, expert_Z, dtype)[:, :f]
        rows, columns, h_columns, d_weight_J = ff.activate_backward(kept, d_h_JF, weight_J)
        d_y_columns = kernels.requantize_columns(d_y_rows, ff.down.rule.wgrad_dy)
        d_down_EFD = ff.down.products.grouped_weight_gradient(h_columns, d_y_columns, *extent)[:, :f, :d]
        d_up_EDF = ff.up.products.grouped_weight_gradient(rows_columns, columns, *extent)[:, :d, :2 * f]
        d_rows_JD = ff.up.products.grouped_dot(rows, up_dgrad, expert_Z, dtype)
    with jax.named_scope("combine"):
        d_h_TD = kernels.combine_rows(d_rows_JD, plan.row_TK, None)[:, :d]
    return d_h_TD, None, d_weight_J[plan.row_TK], ExpertWeights(d_up_EDF, d_down_EFD)


moe.defvjp(_moe_forward, _moe_backward)
