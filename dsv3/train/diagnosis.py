"""Where a non-finite number first appears: the model walked module by module, without jit over the whole."""

from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from dsv3.model.batch import Batch
from dsv3.model.feed_forward import MLP, MoE
from dsv3.model.mla import MLA
from dsv3.model.mtp import MTP, mtp_inputs
from dsv3.model.transformer import Transformer


def is_finite(tree: Any) -> bool:
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree)
               if jnp.issubdtype(leaf.dtype, jnp.floating))


def outputs(model: Transformer, variables: dict[str, Any], batch: Batch, segment_mask: bool) -> Iterator[tuple]:
    """(name, output) of every module in the order of the forward pass: `moe_layers[3].attn`, `mtp_0`, `loss`."""
    config, ops = model.config, model.ops
    bound = model.bind(variables)
    context = bound.training_context(batch, segment_mask)
    x_BTD = bound.embedded(batch.tokens_BT)
    yield "embed", x_BTD
    for name, feed_forward in (("dense_layers", "mlp"), ("moe_layers", "moe")):
        stacked = {collection: tree.get(name) for collection, tree in variables.items()}
        depth = len(jax.tree.leaves(stacked["params"])[0]) if stacked["params"] else 0
        for layer in range(depth):
            params, routing = (jax.tree.map(lambda a: a[layer], stacked[part]) for part in ("params", "routing"))
            attended_BTD, _ = MLA(config, ops).apply({"params": params["attn"]}, x_BTD, context, None)
            yield f"{name}[{layer}].attn", attended_BTD
            x_BTD = x_BTD + attended_BTD
            if feed_forward == "mlp":
                y_BTD = MLP(config, ops).apply({"params": params["mlp"]}, x_BTD)
            else:
                layer_variables = {"params": params["moe"], "routing": (routing or {}).get("moe", {})}
                y_BTD, _ = MoE(config, ops).apply(layer_variables, x_BTD, context.valid_BT)
            yield f"{name}[{layer}].{feed_forward}", y_BTD
            x_BTD = x_BTD + y_BTD
    normed_BTD = bound.final_norm(x_BTD)
    yield "norm", normed_BTD
    flat = lambda array: array.reshape(-1, *array.shape[2:])
    loss = lambda hidden_BTD, targets_BT, weights_BT: ops.loss(
        flat(hidden_BTD), variables["params"]["head"], flat(targets_BT), flat(weights_BT)).total
    yield "head", loss(normed_BTD, batch.targets_BT, batch.weights_BT)
    hidden_BTD = bound.first_hidden(x_BTD, normed_BTD)
    for index in range(config.mtp.depth):
        name, inputs = f"mtp_{index}", mtp_inputs(batch, index + 1)
        own = {part: tree[name] for part, tree in variables.items() if name in tree}
        x_BTD, normed_BTD, _ = MTP(config, ops).apply(own, hidden_BTD, bound.embedded(inputs.tokens_BT), context)
        yield name, normed_BTD
        yield f"{name}, head", loss(normed_BTD, inputs.targets_BT, inputs.weights_BT)
        hidden_BTD = bound.first_hidden(x_BTD, normed_BTD)


def first_nonfinite(
    model: Transformer, params: chex.ArrayTree, routing: chex.ArrayTree, batch: Batch, segment_mask: bool,
) -> str | None:
    """The first place with a NaN or an infinity on one micro-batch, or None: parameters, outputs, then gradients.

    Gradients flow from the loss down, so the culprit is the module nearest to it: the last in the order of the model.
    """
    for path, leaf in jax.tree.leaves_with_path({"params": params, "routing": routing}):
        if not is_finite(leaf):
            return f"the values of {jax.tree_util.keystr(path, simple=True, separator='/')}"
    variables = {"params": params, "routing": routing}
    for name, output in outputs(model, variables, batch, segment_mask):
        if not is_finite(output):
            return f"the output of {name}"
    return _first_gradient(model, variables, batch, segment_mask)


def _first_gradient(model: Transformer, variables: dict, batch: Batch, segment_mask: bool) -> str | None:
    """Of the parameters whose gradient is not finite, the one nearest to the loss."""
    def total(params):
        losses = model.apply(variables | {"params": params}, batch, segment_mask)
        return losses.main + jnp.sum(losses.mtp_D) + losses.balance

    grads = jax.grad(total)(variables["params"])
    found = []
    for path, leaf in jax.tree.leaves_with_path(grads):
        run, inner = path[0].key, "/".join(key.key for key in path[1:])
        layers = range(leaf.shape[0]) if run.endswith("_layers") else (None,)
        for layer in layers:
            if not is_finite(leaf if layer is None else leaf[layer]):
                name = f"{run if layer is None else f'{run}[{layer}]'}{'.' if inner else ''}{inner}"
                found.append((_distance(run, layer, inner), name))
    return f"the gradient of {min(found)[1]}" if found else None


def _distance(run: str, layer: int | None, inner: str) -> tuple[int, int, int]:
    """Sorts parameters by how soon the backward pass reaches them."""
    order = ("mtp", "head", "norm", "moe", "dense", "embed")
    parts = ("moe", "mlp", "attn")  # of a block, from its end; what else there is stands before the block
    part = next((index for index, name in enumerate(parts) if name in inner.split("/")), len(parts))
    return order.index(run.split("_")[0]), -(layer or 0), part
