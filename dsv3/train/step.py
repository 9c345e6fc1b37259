"""One training step: gradients summed over micro-batches, one AdamW update, one routing-bias update."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dsv3.config import TrainConfig
from dsv3.model.batch import Batch
from dsv3.model.transformer import Losses, Transformer
from dsv3.parallel.balance import max_violation, stack_loads, update_routing
from dsv3.train.optimizer import adamw


class TrainState(NamedTuple):
    """All that a step changes. `routing` is apart from `params`: no gradient, decay or cast ever sees it."""

    step: jax.Array
    params: chex.ArrayTree
    routing: chex.ArrayTree
    opt_state: chex.ArrayTree


class Knobs(NamedTuple):
    """Scheduled values of one step, float32 scalars: arguments, so that a change of value does not recompile."""

    learning_rate: jax.Array
    bias_update_speed: jax.Array
    mtp_lambda: jax.Array


class StepMetrics(NamedTuple):
    """Of one step over its global batch. `load_LE` and `max_vio_L` hold the trunk's MoE layers, then the MTP modules.

    Losses are nats per counted token of the main loss; MTP's too, which is the report's 1/T (equation 24).
    """

    loss: jax.Array
    mtp_loss_D: jax.Array
    mtp_agreement_D: jax.Array
    balance: jax.Array
    gradient_norm: jax.Array
    load_LE: jax.Array
    max_vio_L: jax.Array


def init_state(model: Transformer, train: TrainConfig) -> TrainState:
    """Step 0 from `train.seed`; wrap in `jax.eval_shape` for shapes only."""
    example = Batch(*(jnp.zeros((1, train.seq_len), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32)))
    variables = model.init(jax.random.key(train.seed), example)
    params = variables["params"]
    return TrainState(
        jnp.zeros((), jnp.int32), params, variables.get("routing", {}), adamw(train.optimizer).init(params))


def mean_losses(losses: Losses, tokens: jax.Array, sequences: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Main loss, MTP losses and balance loss of a (micro-)batch as its share of a global batch of that many tokens."""
    return losses.main / tokens, losses.mtp_D / tokens, losses.balance / sequences


def make_train_step(
    model: Transformer, train: TrainConfig, segment_mask: bool,
) -> Callable[[TrainState, Batch, Knobs], tuple[TrainState, StepMetrics]]:
    """A jitted step over micro-batches stacked on axis 0 (arrays [M, B, T]). The state's buffers are donated.

    Every micro-batch is normalised by the token count of the whole global batch, so that M micro-batches and one
    batch M times as large give the same gradient however padding is spread. Expert loads are summed before the sign
    of the bias update is taken. Compiles once per M.
    """
    optimizer = adamw(train.optimizer)

    def objective(params, routing, batch, knobs, tokens, sequences):
        losses = model.apply({"params": params, "routing": routing}, batch, segment_mask)
        main, mtp_D, balance = mean_losses(losses, tokens, sequences)
        mtp = jnp.sum(mtp_D) / max(len(mtp_D), 1)
        return main + knobs.mtp_lambda * mtp + train.balance_alpha * balance, losses

    def step(state: TrainState, batches: Batch, knobs: Knobs) -> tuple[TrainState, StepMetrics]:
        tokens = jnp.maximum(jnp.sum(batches.weights_BT), 1)
        sequences = jnp.maximum(jnp.sum(jnp.any(batches.segment_ids_BT > 0, axis=-1), dtype=jnp.float32), 1)

        def micro_step(batch):
            gradient = jax.grad(objective, has_aux=True)
            return gradient(state.params, state.routing, batch, knobs, tokens, sequences)

        def accumulate(sums, batch):
            return jax.tree.map(jnp.add, sums, micro_step(batch)), None

        shapes = jax.eval_shape(micro_step, jax.tree.map(lambda a: a[0], batches))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, losses), _ = jax.lax.scan(accumulate, zeros, batches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - knobs.learning_rate * u, state.params, updates)
        routing = update_routing(state.routing, losses.load, knobs.bias_update_speed)
        main, mtp_D, balance = mean_losses(losses, tokens, sequences)
        load_LE = stack_loads(losses.load)
        metrics = StepMetrics(
            loss=main, mtp_loss_D=mtp_D, mtp_agreement_D=losses.agree_D / jnp.maximum(losses.mtp_tokens_D, 1),
            balance=balance, gradient_norm=optax.tree.norm(grads), load_LE=load_LE,
            max_vio_L=max_violation(load_LE))
        return TrainState(state.step + 1, params, routing, opt_state), metrics

    return jax.jit(step, donate_argnums=0)
