"""The feed-forward half of a block: a dense SwiGLU, or DeepSeekMoE."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3.config import ModelConfig
from dsv3.model import gate
from dsv3.model.ops import ExpertWeights, Ops
from dsv3.model.weights import gain, matrix


class RouterStats(NamedTuple):
    """What a MoE layer reports: pairs per expert over valid tokens, and its balance loss summed over sequences."""

    load_E: jax.Array
    balance: jax.Array


class MLP(nn.Module):
    """w_down(silu(w_gate h) * w_up h) of h = RMSNorm(x): the feed-forward of the first `n_dense_layers` layers."""

    config: ModelConfig
    ops: Ops

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        norm = gain(self, "norm", c.dim)
        gate_up = matrix(self, "gate_up", c.init_std, embed=c.dim, hidden=2 * c.inter_dim)
        down = matrix(self, "down", c.init_std, hidden=c.inter_dim, embed=c.dim)
        return self.ops.mlp(("mlp.gate_up", "mlp.down"), self.ops.norm(x_BTD, norm, c.norm_eps), gate_up, down)


class MoE(nn.Module):
    """sum over chosen experts of weight * Expert(h) + Shared(h) of h = RMSNorm(x) (equations 12 to 16).

    The selection bias lives in the collection `routing`, which no gradient and no weight decay ever sees.
    """

    config: ModelConfig
    ops: Ops

    @nn.compact
    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, RouterStats]:
        c, init, d = self.config.moe, self.config.init_std, self.config.dim
        norm = gain(self, "norm", d)
        w_gate = matrix(self, "gate", init, embed=d, router=c.n_routed_experts)
        weights = ExpertWeights(
            matrix(self, "experts_gate_up", init, expert=c.n_routed_experts, embed=d, hidden=2 * c.moe_inter_dim),
            matrix(self, "experts_down", init, expert=c.n_routed_experts, hidden=c.moe_inter_dim, embed=d))
        bias_E = None
        if c.selection_bias:
            bias_E = self.variable("routing", "bias", jnp.zeros, (c.n_routed_experts,), jnp.float32).value

        h_BTD = self.ops.norm(x_BTD, norm, self.config.norm_eps)
        h_TD = h_BTD.reshape(-1, d)
        with jax.named_scope("router"):
            scores_TE = checkpoint_name(gate.scores(h_TD, w_gate, c), "moe.scores")
            routes = gate.route(scores_TE, bias_E, c)
        y_BTD = self.ops.moe(h_TD, *routes, weights).reshape(x_BTD.shape)
        if c.n_shared_experts > 0:
            width = c.n_shared_experts * c.moe_inter_dim
            gate_up = matrix(self, "shared_gate_up", init, embed=d, hidden=2 * width)
            down = matrix(self, "shared_down", init, hidden=width, embed=d)
            y_BTD += self.ops.mlp(("shared.gate_up", "shared.down"), h_BTD, gate_up, down)
        with jax.named_scope("router"):
            stats = RouterStats(
                gate.expert_counts(routes.topk_TK, valid_BT.reshape(-1), c.n_routed_experts),
                gate.balance_loss(scores_TE.reshape(*valid_BT.shape, c.n_routed_experts), valid_BT, c))
        return y_BTD, stats
