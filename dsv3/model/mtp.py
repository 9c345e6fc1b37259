"""Multi-token prediction (report section 2.2): extra layers that predict further ahead, one token per depth."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3.config import ModelConfig
from dsv3.model.batch import Batch
from dsv3.model.block import remat_block
from dsv3.model.feed_forward import RouterStats
from dsv3.model.mla import Context
from dsv3.model.ops import Ops
from dsv3.model.weights import gain, matrix


class MTPInputs(NamedTuple):
    """At position i, depth k embeds t_{i+k} and predicts t_{i+k+1}, which counts in the loss where weights say so."""

    tokens_BT: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array


def shift_left(array_BT: jax.Array, by: int) -> jax.Array:
    """array[:, i + by] at i, zeros at the end of the row."""
    return jnp.pad(array_BT, [(0, 0), (0, by)])[:, by:]


def mtp_inputs(batch: Batch, depth: int) -> MTPInputs:
    """Inputs of depth `depth` >= 1; the last `depth` positions, and pairs that cross segments, weigh nothing."""
    same_segment_BT = batch.segment_ids_BT == shift_left(batch.segment_ids_BT, depth)
    return MTPInputs(
        shift_left(batch.targets_BT, depth - 1),
        shift_left(batch.targets_BT, depth),
        shift_left(batch.weights_BT, depth) * same_segment_BT)


class MTP(nn.Module):
    """h' = eh_proj[RMSNorm(Emb(t_{i+k})); RMSNorm(h^{k-1})], then one block and the module's own final norm.

    Equation 21 lists the hidden state first, the released weights hold the embedding first: `config.mtp.eh_order`.
    Embedding and head belong to the main model. Returns h^k before and after the norm.
    """

    config: ModelConfig
    ops: Ops

    @nn.compact
    def __call__(
        self, hidden_BTD: jax.Array, embedded_BTD: jax.Array, context: Context,
    ) -> tuple[jax.Array, jax.Array, RouterStats]:
        c = self.config
        hidden_BTD = self.ops.norm(hidden_BTD, gain(self, "hnorm", c.dim), c.norm_eps)
        embedded_BTD = self.ops.norm(embedded_BTD, gain(self, "enorm", c.dim), c.norm_eps)
        pair = (embedded_BTD, hidden_BTD) if c.mtp.eh_order == "embedding_first" else (hidden_BTD, embedded_BTD)
        eh_proj = matrix(self, "eh_proj", c.init_std, hidden=2 * c.dim, embed=c.dim)
        x_BTD = self.ops.linear("mtp.eh_proj", jnp.concatenate(pair, axis=-1), eh_proj)
        block = remat_block(c.remat, scanned=False)(c, self.ops, moe=True, name="block")
        x_BTD, (_, stats) = block(x_BTD, None, context)
        return x_BTD, self.ops.norm(x_BTD, gain(self, "norm", c.dim), c.norm_eps), stats
