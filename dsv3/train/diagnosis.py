"""Where a non-finite number first appears, by three programs: for the parameters, the outputs and the gradients.

Each is compiled once, however many layers and micro-batches there are, needs no more memory than a step, and returns
only what is finite and what is not.
"""

from collections import OrderedDict
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from dsv3.config import UserError
from dsv3.model.batch import Batch
from dsv3.model.feed_forward import MLP, MoE
from dsv3.model.mla import MLA
from dsv3.model.mtp import MTP, mtp_inputs
from dsv3.model.ops import Ops
from dsv3.model.transformer import Transformer, layer_runs


class Diverged(UserError):
    """The guard has ended a run: too many steps in a row whose loss or gradient is not finite."""


def _finite(array: jax.Array, *, stacked: bool = False) -> jax.Array:
    """Whether all elements are finite, or, of an array stacked by layer, [L]."""
    return jnp.all(jnp.isfinite(array), axis=tuple(range(int(stacked), array.ndim)))


@jax.jit
def _values(tree: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(_finite, tree)


@partial(jax.jit, static_argnames=("model", "segment_mask"))
def _outputs(
    model: Transformer, variables: dict[str, Any], batch: Batch, segment_mask: bool,
) -> OrderedDict[str, jax.Array]:
    """Whether the output of every module is finite, in forward order: `moe_layers[3].attn`, `mtp_0`, `mtp_0, head`."""
    config, ops = model.config, model.ops
    bound, found = model.bind(variables), OrderedDict()  # a dict would come back sorted by name
    context = bound.training_context(batch, segment_mask)

    def layer(ops: Ops, x_BTD: jax.Array, own: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        params, routing = own["params"], own["routing"]
        attended_BTD, _ = MLA(config, ops).apply({"params": params["attn"]}, x_BTD, context, None)
        x_BTD = x_BTD + attended_BTD
        if "mlp" in params:
            part, y_BTD = "mlp", MLP(config, ops).apply({"params": params["mlp"]}, x_BTD)
        else:
            moe = {"params": params["moe"], "routing": (routing or {}).get("moe", {})}
            part, (y_BTD, _) = "moe", MoE(config, ops).apply(moe, x_BTD, context.valid_BT)
        return x_BTD + y_BTD, {"attn": _finite(attended_BTD), part: _finite(y_BTD)}  # "attn" sorts first

    def loss(hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
        flat = lambda array: array.reshape(-1, *array.shape[2:])
        return ops.loss(flat(hidden_BTD), variables["params"]["head"], flat(targets_BT), flat(weights_BT)).total

    x_BTD = bound.embedded(batch.tokens_BT)
    found["embed"] = _finite(x_BTD)
    for run, (first, _, length) in layer_runs(config).items():
        for own_ops, some in ops.alike(first, length):
            these = {name: jax.tree.map(lambda leaf: leaf[some], tree.get(run)) for name, tree in variables.items()}
            x_BTD, finite = jax.lax.scan(partial(layer, own_ops), x_BTD, these)
            for index in range(some.stop - some.start):
                found |= {f"{run}[{some.start + index}].{part}": ok_L[index] for part, ok_L in finite.items()}
    normed_BTD = bound.final_norm(x_BTD)
    found["norm"] = _finite(normed_BTD)
    found["head"] = _finite(loss(normed_BTD, batch.targets_BT, batch.weights_BT))
    for index in range(config.mtp.depth):
        name, inputs = f"mtp_{index}", mtp_inputs(batch, index + 1)
        hidden_BTD, embedded_BTD = bound.first_hidden(x_BTD, normed_BTD), bound.embedded(inputs.tokens_BT)
        own = {part: tree[name] for part, tree in variables.items() if name in tree}
        module = MTP(config, ops.of_layer(config.n_layers + index))
        x_BTD, normed_BTD, _ = module.apply(own, hidden_BTD, embedded_BTD, context)
        found[name] = _finite(normed_BTD)
        found[f"{name}, head"] = _finite(loss(normed_BTD, inputs.targets_BT, inputs.weights_BT))
    return found


@partial(jax.jit, static_argnames=("model", "segment_mask"))
def _gradients(model: Transformer, variables: dict[str, Any], batch: Batch, segment_mask: bool) -> chex.ArrayTree:
    """For every parameter whether its gradient is finite, or [L] where layers are stacked."""
    def total(params: chex.ArrayTree) -> jax.Array:
        losses = model.apply(variables | {"params": params}, batch, segment_mask)
        return losses.main + jnp.sum(losses.mtp_D) + losses.balance

    return jax.tree.map_with_path(
        lambda path, leaf: _finite(leaf, stacked=path[0].key.endswith("_layers")), jax.grad(total)(variables["params"]))


def first_nonfinite(
    model: Transformer, params: chex.ArrayTree, routing: chex.ArrayTree, batch: Batch, segment_mask: bool,
) -> str | None:
    """The first place with a NaN or an infinity on one micro-batch, or None: parameters, outputs, then gradients.

    Gradients flow from the loss down, so the culprit is the module nearest to it: the last in the order of the model.
    """
    variables = {"params": params, "routing": routing}
    for path, finite in jax.tree.leaves_with_path(jax.device_get(_values(variables))):
        if not finite:
            return f"the values of {jax.tree_util.keystr(path, simple=True, separator='/')}"
    for name, finite in jax.device_get(_outputs(model, variables, batch, segment_mask)).items():
        if not finite:
            return f"the output of {name}"
    found = []
    for path, finite in jax.tree.leaves_with_path(jax.device_get(_gradients(model, variables, batch, segment_mask))):
        run, inner = path[0].key, "/".join(key.key for key in path[1:])
        for layer, good in enumerate(finite) if finite.ndim else [(None, finite)]:
            if not good:
                name = f"{run if layer is None else f'{run}[{layer}]'}{'.' if inner else ''}{inner}"
                found.append((_distance(run, layer, inner), name))
    return f"the gradient of {min(found)[1]}" if found else None


def _distance(run: str, layer: int | None, inner: str) -> tuple[int, int, int]:
    """Sorts parameters by how soon the backward pass reaches them."""
    order = ("mtp", "head", "norm", "moe", "dense", "embed")
    parts = ("moe", "mlp", "attn")  # of a block, from its end; what else there is stands before the block
    part = next((index for index, name in enumerate(parts) if name in inner.split("/")), len(parts))
    return order.index(run.split("_")[0]), -(layer or 0), part
