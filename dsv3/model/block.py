"""One transformer layer, and runs of equal layers scanned over stacked parameters."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3.config import ModelConfig
from dsv3.model.feed_forward import MLP, MoE, RouterStats
from dsv3.model.mla import MLA, Context, LatentCache
from dsv3.model.ops import Ops

SAVED_BY_REPORT = (
    "attn.q", "attn.q_a", "attn.kv_a", "attn.core", "attn.o.input", "block.attended",
    "mlp.down.input", "shared.down.input", "moe.scores", "moe.routes", "moe.plan",
    "experts.rows", "experts.down.input", "experts.down",
)
"""What the report's policy keeps for the backward pass: inputs and outputs of products, not RMSNorm, SwiGLU or the MLA
up-projections, which it computes again (section 3.2.3). `mlp.down.input` is the input of the SwiGLU before `mlp.down`.
"""


class Block(nn.Module):
    """x += MLA(RMSNorm(x)); x += FFN(RMSNorm(x)), with a dense or a mixture-of-experts FFN."""

    config: ModelConfig
    ops: Ops
    moe: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: LatentCache | None, context: Context,
    ) -> tuple[jax.Array, tuple[LatentCache | None, RouterStats | None]]:
        attended_BTD, cache = MLA(self.config, self.ops, name="attn")(x_BTD, context, cache)
        x_BTD = checkpoint_name(x_BTD + attended_BTD, "block.attended")
        if not self.moe:
            return x_BTD + MLP(self.config, self.ops, name="mlp")(x_BTD), (cache, None)
        y_BTD, stats = MoE(self.config, self.ops, name="moe")(x_BTD, context.valid_BT)
        return x_BTD + y_BTD, (cache, stats)


def remat_block(policy: str, *, scanned: bool) -> type[Block]:
    """`Block` under a named recomputation policy; the parameter tree is the same under all of them.

    `none` keeps everything, `report` keeps `SAVED_BY_REPORT`, `full` keeps only the block's input.
    """
    policies = jax.checkpoint_policies
    keep = {
        "report": policies.save_only_these_names(*SAVED_BY_REPORT),
        "full": policies.nothing_saveable,
    }
    if policy == "none":
        return Block
    return nn.remat(Block, prevent_cse=not scanned, policy=keep[policy])


def layer_run(config: ModelConfig, ops: Ops, *, moe: bool, length: int, **place) -> nn.Module:
    """`length` equal blocks as one scan: parameters, caches and statistics are stacked on axis 0.

    Compile time grows with the number of such runs, not with depth. `place`: name and parent, as of every module.
    """
    scanned = nn.scan(
        remat_block(config.remat, scanned=True),
        variable_axes={"params": 0, "routing": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
        unroll=min(config.scan_unroll, length),
    )
    return scanned(config, ops, moe, **place)
