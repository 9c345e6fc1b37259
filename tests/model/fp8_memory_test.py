"""What waits for the backward pass, counted by hand, found in the program, and measured in what was compiled."""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from tiny_models import model_config, random_batch

from dsv3.config import resolve
from dsv3.kernels.attention import ATTENTION, attend
from dsv3.kernels.grouped_dot import padded_rows
from dsv3.model.fp8_ops import fp8_ops
from dsv3.model.ops import attention_linear, reference_ops
from dsv3.model.transformer import Transformer

B, T, DIM, HEADS, NOPE, ROPE, V, Q, KV, F, E, K = 4, 256, 256, 4, 64, 32, 64, 128, 128, 128, 4, 2
TOKENS = B * T
ROWS = padded_rows(TOKENS * K, E, 128)
# Attention whose probabilities do not wait, as in the 8-bit bundle: memory of T x T is not what is compared.
BF16 = dataclasses.replace(
    reference_ops(row_block=128), attention_linear=partial(attention_linear, attention=partial(attend, ATTENTION)))
BUNDLES = {"bf16": BF16, "fp8": fp8_ops(resolve("fp8"), base=BF16)}


def program(bundle, remat, n_layers):
    """The gradient of a few MoE layers in bfloat16, and the shapes of its parameters."""
    config = model_config(
        dtype="bfloat16", remat=remat, n_layers=n_layers, n_dense_layers=0, dim=DIM, mtp=dict(depth=0),
        attention=dict(n_heads=HEADS, q_lora_rank=Q, kv_lora_rank=KV, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE,
                       v_head_dim=V),
        moe=dict(n_routed_experts=E, n_expert_groups=1, n_limited_groups=1, n_activated_experts=K, moe_inter_dim=F))
    model, batch = Transformer(config, BUNDLES[bundle]), random_batch(config, B, T)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))

    def loss(params):
        losses = model.apply({"params": params, "routing": zeros}, batch)
        return losses.main + losses.balance

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes["routing"])
    return jax.jit(jax.grad(loss)), shapes["params"]


def forward_layers(jaxpr, n_layers):
    """What the scan over layers of the forward pass stacks for the backward pass."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and not equation.params["reverse"] and (
                equation.params["length"] == n_layers):
            return [v.aval for v in equation.outvars if v.aval.shape[:1] == (n_layers,)]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and (found := forward_layers(inner, n_layers)):
                return found
    return []


def waiting(bundle, remat, n_layers=3):
    """Bytes a layer, and how many of those are 8-bit floats."""
    gradient, params = program(bundle, remat, n_layers)
    stacked = forward_layers(jax.make_jaxpr(gradient)(params).jaxpr, n_layers)
    size = lambda avals: sum(math.prod(aval.shape[1:]) * aval.dtype.itemsize for aval in avals)
    return size(stacked), size([aval for aval in stacked if jnp.issubdtype(aval.dtype, jnp.floating)
                                and aval.dtype.itemsize == 1])


def predicted(fp8):
    """Bytes a layer under `report`, counted by hand."""
    scaled = lambda n, width, element: n * width * element + n * width // 128 * 4
    inputs = 2 * TOKENS * (DIM + DIM + Q + KV + ROPE)  # of the block, of its second half, and of the latents' norms
    routing = TOKENS * (4 * E + 2 * 4 * K) + 4 * ROWS  # scores, routes, rows of tokens, tokens of rows
    routing += 4 * (ROWS - TOKENS * K)  # rows of padding
    counts = 4 * (E + B * E)  # sizes of groups, choices of each sequence
    if fp8:
        return inputs + routing + counts + (
            scaled(TOKENS, HEADS * V, 1.5) + scaled(ROWS, 2 * F, 1) + scaled(TOKENS, 2 * F, 1))
    return inputs + routing + counts + 2 * (TOKENS * HEADS * V + ROWS * (DIM + 2 * F + DIM) + TOKENS * 2 * F)


def compiled_bytes(bundle, remat):
    """Temporary memory that one more layer costs."""
    sizes = []
    for n_layers in (2, 6):
        gradient, params = program(bundle, remat, n_layers)
        sizes.append(gradient.lower(params).compile().memory_analysis().temp_size_in_bytes)
    return (sizes[1] - sizes[0]) / 4


def test_what_waits_is_what_was_counted():
    """Also the smallest of it; load_E and the balance loss of a layer are results, not kept, but stacked like it."""
    results = 4 * E + 4
    for name in BUNDLES:
        assert waiting(name, "report")[0] == predicted(name == "fp8") + results
    assert predicted(True) < 0.47 * predicted(False)


@pytest.mark.slow
@pytest.mark.parametrize("remat, share", [("report", 0.47), ("none", 0.65)])
def test_memory_falls_by_what_was_predicted(remat, share):
    """What is measured is what waits, within 1%; under `none` XLA merges tensors of the bfloat16 model that wait twice,
    and packs buffers by how many layers there are: up to 9% less.

    On a CPU, XLA holds 8-bit floats in 16 bits inside loops: those bytes are found and taken off.
    """
    measured = {}
    for name in BUNDLES:
        held, in_8_bits = waiting(name, remat)
        measured[name] = compiled_bytes(name, remat) - in_8_bits
        merged = 0.09 if remat == "none" else 0.01
        assert 1 - merged < measured[name] / held < 1.01, (name, measured[name], held)
    assert measured["fp8"] < share * measured["bf16"]
