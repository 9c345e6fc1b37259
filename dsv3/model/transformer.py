"""The whole model: embedding, runs of layers, final norm, head, and the MTP modules beside them."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3.config import ModelConfig
from dsv3.model.batch import Batch
from dsv3.model.block import layer_run
from dsv3.model.feed_forward import RouterStats
from dsv3.model.mla import Context, LatentCache
from dsv3.model.mtp import MTP, mtp_inputs, shift_left
from dsv3.model.ops import Ops
from dsv3.model.rope import rotation
from dsv3.model.weights import gain, matrix


class Losses(NamedTuple):
    """Sums over one micro-batch, to be divided by counts of the whole global batch.

    `main` and `mtp_D` are weighted sums of nats; `balance` sums layers and sequences. `load` maps every stack of MoE
    layers to its pairs per expert ([L, E], or [E] for an MTP module), in the order of the `routing` collection.
    `agree_D` counts positions where depth k's argmax equals the main model's argmax for the same token, out of
    `mtp_tokens_D`; `chance_D` counts the same after the main model's guesses were put in reverse order.
    """

    main: jax.Array
    mtp_D: jax.Array
    balance: jax.Array
    tokens: jax.Array
    sequences: jax.Array
    load: dict[str, jax.Array]
    agree_D: jax.Array
    chance_D: jax.Array
    mtp_tokens_D: jax.Array


def _of_depths(values: list[jax.Array]) -> jax.Array:
    """Scalars of every MTP depth as one array [D]; without depths it is computed, as [0], rather than a constant.

    `jnp.array([])` would be a constant, which an enclosing `shard_map` takes as an operand: XLA (jaxlib 0.11.2) removes
    operands without elements and then crashes on the call that lacks one.
    """
    return jnp.stack(values) if values else jnp.zeros((0,), jnp.float32)


def layer_runs(config: ModelConfig) -> dict[str, tuple[int, bool, int]]:
    """Of every run of equal layers: the number of its first, whether they have experts, how many they are."""
    return {"dense_layers": (0, False, config.n_dense_layers),
            "moe_layers": (config.n_dense_layers, True, config.n_moe_layers)}


class Transformer(nn.Module):
    """DeepSeek-V3 as single-device mathematics. Every method is for `Transformer.apply(..., method=...)`."""

    config: ModelConfig
    ops: Ops

    def setup(self) -> None:
        c = self.config
        self.embed = matrix(self, "embed", c.init_std, vocab=c.vocab_size, embed=c.dim)
        runs = layer_runs(c)
        self.runs = {
            name: layer_run(c, self.ops, moe=moe, length=length, name=name)
            for name, (_, moe, length) in runs.items() if length > 0
        }
        self.norm = gain(self, "norm", c.dim)
        self.head = matrix(self, "head", c.init_std, embed=c.dim, vocab=c.vocab_size)
        self.mtp = [MTP(c, self.ops.of_layer(c.n_layers + depth), name=f"mtp_{depth}") for depth in range(c.mtp.depth)]

    def embedded(self, tokens_BT: jax.Array) -> jax.Array:
        return self.embed[tokens_BT].astype(self.config.dtype)

    def trunk(
        self, tokens_BT: jax.Array, context: Context, caches: dict[str, LatentCache] | None = None,
    ) -> tuple[jax.Array, dict[str, LatentCache], dict[str, RouterStats]]:
        """The hidden state before the final norm, [B, T, D], with the new caches and statistics of every run."""
        x_BTD = self.embedded(tokens_BT)
        new_caches, stats = {}, {}
        for name, run in self.runs.items():
            cache = None if caches is None else caches[name]
            x_BTD, (cache, run_stats) = self._layers(name, run, x_BTD, cache, context)
            new_caches |= {name: cache}
            stats |= {} if run_stats is None else {name: run_stats}
        return x_BTD, new_caches, stats

    def _layers(self, name: str, run: nn.Module, x_BTD: jax.Array, caches: LatentCache | None, context: Context):
        """A run of layers: one scan, or one after the other for layers whose operations differ.

        The parameters are the same in both: a checkpoint does not know what its layers computed in.
        """
        first, moe, length = layer_runs(self.config)[name]
        parts = self.ops.alike(first, length)
        if len(parts) == 1 and parts[0][0] is self.ops or self.is_initializing():
            return run(x_BTD, caches, context)
        found = []
        for ops, some in parts:
            these = lambda tree, some=some: jax.tree.map(lambda leaf: leaf[some], tree)
            part = layer_run(self.config, ops, moe=moe, length=some.stop - some.start, name=None, parent=None)
            x_BTD, outputs = part.apply(these(dict(run.variables)), x_BTD, these(caches), context)
            found.append(outputs)
        return x_BTD, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)

    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        return self.ops.norm(x_BTD, self.norm, self.config.norm_eps)

    def logits(self, normed_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V] of a normalised hidden state."""
        head = self.head.astype(normed_BTD.dtype)
        return jnp.einsum("btd,dv->btv", normed_BTD, head, preferred_element_type=jnp.float32)

    def training_context(self, batch: Batch, segment_mask: bool) -> Context:
        positions_BT = jnp.broadcast_to(jnp.arange(batch.tokens_BT.shape[1]), batch.tokens_BT.shape)
        segment_ids_BT = batch.segment_ids_BT if segment_mask else None
        return Context(
            rotation(self.config.attention, positions_BT), positions_BT, segment_ids_BT, batch.segment_ids_BT > 0)

    def predict_ahead(self, hidden_BTD: jax.Array, batch: Batch, context: Context):
        """Yield (MTPInputs, normalised hidden state, statistics) of every depth in turn."""
        for depth, module in enumerate(self.mtp, start=1):
            inputs = mtp_inputs(batch, depth)
            x_BTD, normed_BTD, stats = module(hidden_BTD, self.embedded(inputs.tokens_BT), context)
            yield inputs, normed_BTD, stats
            hidden_BTD = normed_BTD if self.config.mtp.hidden == "post_norm" else x_BTD

    def first_hidden(self, x_BTD: jax.Array, normed_BTD: jax.Array) -> jax.Array:
        """h^0 of the MTP chain: the report does not say whether it is taken before or after the final norm."""
        return normed_BTD if self.config.mtp.hidden == "post_norm" else x_BTD

    def forward(self, batch: Batch, segment_mask: bool = False) -> tuple[jax.Array, list[jax.Array]]:
        """Logits of the main model and of every MTP depth, each [B, T, V] float32: for inspection and tests."""
        context = self.training_context(batch, segment_mask)
        x_BTD, _, _ = self.trunk(batch.tokens_BT, context)
        normed_BTD = self.final_norm(x_BTD)
        ahead = self.predict_ahead(self.first_hidden(x_BTD, normed_BTD), batch, context)
        return self.logits(normed_BTD), [self.logits(deeper_BTD) for _, deeper_BTD, _ in ahead]

    def __call__(self, batch: Batch, segment_mask: bool = False) -> Losses:
        """All losses of one micro-batch, without an array of [tokens, vocabulary].

        `segment_mask` keeps documents of a row apart (SFT); pre-training does not (report sections 4.1 and 5.1).
        """
        context = self.training_context(batch, segment_mask)
        x_BTD, _, stats = self.trunk(batch.tokens_BT, context)
        normed_BTD = self.final_norm(x_BTD)
        main = self._head_loss(normed_BTD, batch.targets_BT, batch.weights_BT)
        main_argmax_BT = main.argmax_T.reshape(batch.tokens_BT.shape)
        mtp, agree, chance, counted = [], [], [], []
        ahead = self.predict_ahead(self.first_hidden(x_BTD, normed_BTD), batch, context)
        for depth, (inputs, deeper_BTD, mtp_stats) in enumerate(ahead, start=1):
            loss = self._head_loss(deeper_BTD, inputs.targets_BT, inputs.weights_BT)
            argmax_BT = loss.argmax_T.reshape(batch.tokens_BT.shape)
            mtp.append(loss.total)
            agree.append(jnp.sum((argmax_BT == shift_left(main_argmax_BT, depth)) * inputs.weights_BT))
            chance.append(jnp.sum((argmax_BT == main_argmax_BT[::-1, ::-1]) * inputs.weights_BT))
            counted.append(jnp.sum(inputs.weights_BT))
            stats |= {f"mtp_{depth - 1}": mtp_stats}
        return Losses(
            main=main.total,
            mtp_D=_of_depths(mtp),
            balance=sum((jnp.sum(run.balance) for run in stats.values()), jnp.float32(0)),
            tokens=jnp.sum(batch.weights_BT),
            sequences=jnp.sum(jnp.any(context.valid_BT, axis=1), dtype=jnp.float32),
            load={name: run.load_E for name, run in stats.items()},
            agree_D=_of_depths(agree),
            chance_D=_of_depths(chance),
            mtp_tokens_D=_of_depths(counted))

    def _head_loss(self, normed_BTD, targets_BT, weights_BT):
        return self.ops.loss(
            normed_BTD.reshape(-1, normed_BTD.shape[-1]), self.head, targets_BT.reshape(-1), weights_BT.reshape(-1))

    def decode(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, caches: dict[str, LatentCache],
    ) -> tuple[jax.Array, dict[str, LatentCache]]:
        """Logits [B, T, V] of new tokens at `positions_BT`, attending to the latent caches, and the caches with them.

        One method for prefill (T > 1) and for decoding (T = 1); the MTP modules are not part of it.
        """
        context = Context(
            rotation(self.config.attention, positions_BT), positions_BT, None, jnp.ones(tokens_BT.shape, bool))
        x_BTD, caches, _ = self.trunk(tokens_BT, context, caches)
        return self.logits(self.final_norm(x_BTD)), caches
