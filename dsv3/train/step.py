"""One training step: gradients summed over micro-batches and devices, one AdamW update, one routing-bias update."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3.config import OptimizerConfig, TrainConfig
from dsv3.model.batch import Batch
from dsv3.model.transformer import Losses, Transformer
from dsv3.parallel import mesh as meshes
from dsv3.parallel.balance import max_violation, stack_loads, update_routing
from dsv3.train.optimizer import adamw


class BadSteps(NamedTuple):
    """Steps that changed nothing, as their loss or gradient was not finite: the latest in a row, and all of them."""

    in_a_row: jax.Array
    total: jax.Array


class TrainState(NamedTuple):
    """All that a step changes. `routing` is apart from `params`: no gradient, decay or cast ever sees it."""

    step: jax.Array
    params: chex.ArrayTree
    routing: chex.ArrayTree
    opt_state: chex.ArrayTree
    bad_steps: BadSteps


class Knobs(NamedTuple):
    """Scheduled values of one step, float32 scalars: arguments, so that a change of value does not recompile."""

    learning_rate: jax.Array
    bias_update_speed: jax.Array
    mtp_lambda: jax.Array
    balance_alpha: jax.Array


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
    bad_steps: BadSteps


class Recipe(NamedTuple):
    """What a compiled step depends on. Runs that differ in schedules or seeds alone share one program."""

    model: Transformer
    optimizer: OptimizerConfig
    seq_len: int
    segment_mask: bool
    mesh: Mesh

    def initial_state(self, seed: jax.Array | int = 0) -> TrainState:
        """Step 0; the parameters still carry the names of their axes."""
        dtypes = (jnp.int32, jnp.int32, jnp.float32, jnp.int32)
        variables = self.model.init(jax.random.key(seed), Batch(*(jnp.zeros((1, self.seq_len), d) for d in dtypes)))
        params, zero = variables["params"], jnp.zeros((), jnp.int32)
        return TrainState(zero, params, variables.get("routing", {}), adamw(self.optimizer).init(nn.unbox(params)),
                          BadSteps(zero, zero))

    @lru_cache(maxsize=8)
    def boxed_state(self) -> TrainState:
        """Shapes and dtypes of `initial_state`, traced once for all that ask."""
        return jax.eval_shape(self.initial_state)

    def specs(self) -> TrainState:
        """Where everything lives: a `PartitionSpec` for every array of the state.

        Parameters by the rules table; both moments like their parameter and divided over `data` besides (ZeRO-1).
        """
        boxed = self.boxed_state()
        params = meshes.parameter_specs(boxed.params)
        zero = self.zero_specs(params, nn.unbox(boxed.params))
        structure = jax.tree.structure(zero, is_leaf=_is_spec)
        same = lambda tree: jax.tree.structure(tree) == structure
        replicated = lambda tree: jax.tree.map(lambda _: P(), tree)
        opt_state = jax.tree.map(lambda part: zero if same(part) else P(), boxed.opt_state, is_leaf=same)
        return TrainState(P(), params, replicated(boxed.routing), opt_state, replicated(boxed.bad_steps))

    def zero_specs(self, specs: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
        """Specs of what ZeRO-1 divides, gradients and moments, from those of the parameters."""
        size = self.mesh.shape[meshes.DATA]
        return jax.tree.map(lambda spec, p: meshes.zero_spec(spec, p.shape, size), specs, params, is_leaf=_is_spec)


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, P)


def make_recipe(model: Transformer, train: TrainConfig, segment_mask: bool, mesh: Mesh) -> Recipe:
    return Recipe(model, train.optimizer, train.seq_len, segment_mask, mesh)


def abstract_state(recipe: Recipe) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing anything."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        nn.unbox(recipe.boxed_state()), meshes.shardings(recipe.mesh, recipe.specs()))


@lru_cache(maxsize=4)
def make_init(recipe: Recipe) -> Callable[[int], TrainState]:
    """A jitted function from a seed to step 0, born where it lives."""
    placement = meshes.shardings(recipe.mesh, recipe.specs())
    return jax.jit(lambda seed: nn.unbox(recipe.initial_state(seed)), out_shardings=placement)


def mean_losses(losses: Losses, tokens: jax.Array, sequences: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Main loss, MTP losses and balance loss of a (micro-)batch as its share of a global batch of that many tokens."""
    return losses.main / tokens, losses.mtp_D / tokens, losses.balance / sequences


def make_gradients(
    recipe: Recipe,
) -> Callable[[chex.ArrayTree, chex.ArrayTree, Batch, Knobs], tuple[chex.ArrayTree, Losses]]:
    """(params, routing, batches [M, B, T], knobs) -> gradients and summed `Losses` of the global batch.

    One manual `shard_map` over the whole mesh: every device adds up its own rows' gradients over M micro-batches, and
    the sums meet in a reduce-scatter, so each device holds the shard whose moments it keeps. Every micro-batch is
    normalised by the token count of the whole global batch: however rows and padding are spread over micro-batches and
    devices, the gradient is the same.
    """
    model, mesh, specs = recipe.model, recipe.mesh, recipe.specs().params
    reduced = recipe.zero_specs(specs, abstract_state(recipe).params)

    def objective(params, routing, batch, knobs, tokens, sequences):
        losses = model.apply({"params": params, "routing": routing}, batch, recipe.segment_mask)
        main, mtp_D, balance = mean_losses(losses, tokens, sequences)
        mtp = jnp.sum(mtp_D) / max(len(mtp_D), 1)
        return main + knobs.mtp_lambda * mtp + knobs.balance_alpha * balance, losses

    def reduce(gradient, spec):
        axis = meshes.zero_axis(spec, gradient.shape, mesh.shape[meshes.DATA])
        if axis is None:
            return jax.lax.psum(gradient, meshes.DATA)
        return jax.lax.psum_scatter(gradient, meshes.DATA, scatter_dimension=axis, tiled=True)

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P(), meshes.BATCH, P()), out_specs=(reduced, P()),
             check_vma=False)
    def gradients(params, routing, batches, knobs):
        tokens, sequences = counts(batches)

        def micro_step(batch):
            return jax.grad(objective, has_aux=True)(params, routing, batch, knobs, tokens, sequences)

        def accumulate(sums, batch):
            return jax.tree.map(jnp.add, sums, micro_step(batch)), None

        shapes = jax.eval_shape(micro_step, jax.tree.map(lambda a: a[0], batches))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, losses), _ = jax.lax.scan(accumulate, zeros, batches)
        return jax.tree.map(reduce, grads, specs), jax.lax.psum(losses, meshes.DATA)

    return gradients


def counts(batches: Batch) -> tuple[jax.Array, jax.Array]:
    """Counted tokens and sequences that are not padding, of all devices together (inside `shard_map`); at least 1."""
    tokens = jnp.sum(batches.weights_BT)
    sequences = jnp.sum(jnp.any(batches.segment_ids_BT > 0, axis=-1), dtype=jnp.float32)
    return tuple(jnp.maximum(jax.lax.psum(count, meshes.DATA), 1) for count in (tokens, sequences))


@lru_cache(maxsize=4)
def make_train_step(recipe: Recipe) -> Callable[[TrainState, Batch, Knobs], tuple[TrainState, StepMetrics]]:
    """A jitted step over micro-batches stacked on axis 0 (arrays [M, B, T]). The state's buffers are donated.

    Expert loads are summed over the global batch before the sign of the bias update is taken. A step whose losses or
    gradient are not all finite changes nothing but its own count: the decision is made here, on the device, so no bad
    number reaches the weights, the moments, the routing biases, or anything that copies them. Compiles once per M; the
    same recipe gives the same function, compiled already.
    """
    optimizer, gradients = adamw(recipe.optimizer), make_gradients(recipe)
    placement = meshes.shardings(recipe.mesh, recipe.specs())

    def step(state: TrainState, batches: Batch, knobs: Knobs) -> tuple[TrainState, StepMetrics]:
        grads, losses = gradients(state.params, state.routing, batches, knobs)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - knobs.learning_rate * u, state.params, updates)
        routing = update_routing(state.routing, losses.load, knobs.bias_update_speed)

        main, mtp_D, balance = mean_losses(losses, jnp.maximum(losses.tokens, 1), jnp.maximum(losses.sequences, 1))
        gradient_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(gradient_norm + main + jnp.sum(mtp_D) + balance)
        params, routing, opt_state = jax.tree.map(
            partial(jnp.where, finite), (params, routing, opt_state), (state.params, state.routing, state.opt_state))
        bad = 1 - finite.astype(jnp.int32)
        bad_steps = BadSteps((state.bad_steps.in_a_row + 1) * bad, state.bad_steps.total + bad)
        load_LE = stack_loads(losses.load)
        metrics = StepMetrics(
            loss=main, mtp_loss_D=mtp_D, mtp_agreement_D=losses.agree_D / jnp.maximum(losses.mtp_tokens_D, 1),
            balance=balance, gradient_norm=gradient_norm, load_LE=load_LE, max_vio_L=max_violation(load_LE),
            bad_steps=bad_steps)
        return TrainState(state.step + 1, params, routing, opt_state, bad_steps), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
