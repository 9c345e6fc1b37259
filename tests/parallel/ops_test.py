"""The choice of kernels: by device, by shape, or refused in one line."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiny_models import model_config, random_batch, random_variables

from dsv3.config import UserError, resolve
from dsv3.kernels import tuning
from dsv3.model.ops import ExpertWeights, attention, reference_ops
from dsv3.model.transformer import Transformer
from dsv3.parallel import ops
from experiments.launch import load_config

H100 = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100 80GB HBM3")


def on_h100(monkeypatch):
    monkeypatch.setattr(ops.jax, "devices", lambda: [H100])


def warnings_of(monkeypatch):
    found = []
    monkeypatch.setattr(ops.logging, "warning", lambda message, *values: found.append(message % values))
    return found


def test_an_unknown_name_is_a_users_mistake():
    with pytest.raises(UserError, match="'fast'; expected one of auto, reference, require"):
        ops.make_ops("fast", None)


def test_a_cpu_gets_the_reference_and_cannot_be_required_to_do_more():
    for name in ("auto", "reference"):
        assert ops.make_ops(name, None).attention_linear.keywords == {"attention": attention}
    with pytest.raises(UserError, match="kernels=require needs a Hopper GPU .* cpu; use"):
        ops.make_ops("require", None)


@pytest.mark.parametrize("changes, hopper", [
    ({}, True), ({"compute_capability": "8.0"}, False), ({"compute_capability": "10.0"}, False),
    ({"platform": "cpu"}, False)])
def test_hopper_is_compute_capability_9_0(changes, hopper):
    assert ops.is_hopper(SimpleNamespace(**(vars(H100) | changes))) == hopper


@pytest.mark.parametrize("kind, capability", [("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA B200", "10.0")])
@pytest.mark.parametrize("recipe", [None, resolve("fp8")])
def test_another_gpu_is_warned_about_once(monkeypatch, kind, capability, recipe):
    device = SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=kind)
    monkeypatch.setattr(ops.jax, "devices", lambda: [device])
    warnings = warnings_of(monkeypatch)
    bundle = ops.make_ops("auto", recipe)
    assert len(warnings) == 1
    assert "falling back" in warnings[0] and f"{kind} has compute capability {capability}" in warnings[0]
    ops.make_ops("reference", recipe)
    with pytest.raises(UserError, match=kind):
        ops.make_ops("require", recipe)
    monkeypatch.undo()
    jax.eval_shape(bundle.moe, *ops_tokens(192), ops_weights(192))
    assert len(warnings) == 1


def test_a_cpu_is_no_surprise(monkeypatch):
    warnings = warnings_of(monkeypatch)
    ops.make_ops("auto", None)
    assert not warnings


def test_refused_shapes_take_the_reference_and_warn_once_each(monkeypatch):
    """A miniature in float32 on a pretended H100: no kernel accepts it, so the losses are the reference's."""
    on_h100(monkeypatch)
    bundle, config = ops.make_ops("auto", None), model_config()
    monkeypatch.undo()
    warnings = warnings_of(monkeypatch)
    variables, batch = random_variables(config), random_batch(config)
    losses = [jax.jit(Transformer(config, chosen).apply)(variables, batch) for chosen in (bundle, reference_ops())]
    chex.assert_trees_all_close(*losses, rtol=1e-4)
    assert len(warnings) == 3 and len(set(warnings)) == 3
    assert all("falling back" in line and "float32" in line for line in warnings)


def test_require_refuses_shapes_in_one_line(monkeypatch):
    on_h100(monkeypatch)
    bundle = ops.make_ops("require", None)
    monkeypatch.undo()
    with pytest.raises(UserError, match="experts of 192 x 512: both must be multiples of 128"):
        jax.eval_shape(bundle.moe, *ops_tokens(192), ops_weights(192))
    with pytest.raises(UserError, match="RMSNorm of 192 elements: it must be a multiple of 128"):
        bundle.norm_linear(("attn.q_a",), jnp.zeros((8, 192), jnp.bfloat16), jnp.ones(192), (jnp.ones((192, 8)),), 1e-6)
    for dtype, value, reason in ((jnp.float32, 128, "attention in float32"),
                                 (jnp.bfloat16, 64, "attention heads of 192 / 64: they must be")):
        with pytest.raises(UserError, match=reason):
            bundle.attention_linear("attn.o", *whole_heads(value, dtype), jnp.zeros((2 * value, 64)),
                                    scale=1.0, segment_ids_BT=None)


def whole_heads(value, dtype=jnp.bfloat16):
    """What two heads of V3's keys and values of `value` read, and a rotation."""
    return (jnp.zeros((1, 8, 2, 192), dtype), jnp.zeros((1, 8, 2, 128 + value), dtype), jnp.zeros((1, 8, 64), dtype),
            jnp.zeros((2, 1, 8, 32)))


def ops_tokens(n_in):
    """Eight tokens, each of which visits both experts."""
    return (jnp.zeros((8, n_in), jnp.bfloat16), jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (8, 2)),
            jnp.ones((8, 2)))


def ops_weights(n_in):
    return ExpertWeights(jnp.zeros((2, n_in, 512)), jnp.zeros((2, 256, n_in)))


@pytest.mark.parametrize("n_in", [576, 2112])
def test_experts_in_8_bits_of_broken_tiles_reach_the_kernels(monkeypatch, n_in):
    """Both ways, and nothing is refused: rows are combined in whole tiles."""
    on_h100(monkeypatch)
    moe = ops.make_ops("require", resolve("fp8")).moe
    monkeypatch.undo()
    h_TD, topk_TK, gate_TK = ops_tokens(n_in)

    def run(h_TD, gate_TK, weights):
        y_TD, vjp = jax.vjp(lambda h, gate, weights: moe(h, topk_TK, gate, weights), h_TD, gate_TK, weights)
        return y_TD, vjp(y_TD)

    out = jax.eval_shape(run, h_TD, gate_TK, ops_weights(n_in))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, (h_TD, (h_TD, gate_TK, ops_weights(n_in))))


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_norms_look_into_the_tuning_table(monkeypatch, recipe):
    """Of the device's own kind and their width; an entry that cannot run shows that it was found."""
    on_h100(monkeypatch)
    entry = {"parameters": {"stages": 1, "behind": 1}}
    table = {H100.device_kind: {"norm": {"512": entry}}}
    monkeypatch.setattr(tuning, "read", lambda: table)
    bundle = ops.make_ops("require", resolve(recipe))
    norm = lambda width: jax.eval_shape(
        lambda x, gain: bundle.norm(x, gain, 1e-6), jnp.zeros((8, width), jnp.bfloat16), jnp.ones(width))
    assert norm(256).shape == (8, 256)
    with pytest.raises(UserError, match="would wait for ever"):
        norm(512)


def primitives(jaxpr) -> Counter:
    """Of a program, but not of its kernels."""
    found = Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        if equation.primitive.name != "mpmd_map":  # a kernel
            for inner in jaxprs_in_params(equation.params):
                found += primitives(inner)
    return found


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_every_norm_of_small_moe_is_a_kernel(monkeypatch, recipe):
    """Its widths are 1280, 512 and 256, and `require` refuses nothing. The reference shows what would be found."""
    on_h100(monkeypatch)
    bundle = ops.make_ops("require", resolve(recipe))
    monkeypatch.undo()
    config = load_config("configs/small_moe.py", []).model
    config = dataclasses.replace(config, scan_unroll=1, mtp=dataclasses.replace(config.mtp, depth=0))
    batch = random_batch(config, length=128)
    variables = jax.eval_shape(Transformer(config, reference_ops()).init, jax.random.key(0), batch)
    traced = [jax.make_jaxpr(Transformer(config, chosen).apply)(variables, batch) for chosen in (
        bundle, reference_ops())]
    kernels, plain = (primitives(jaxpr.jaxpr) for jaxpr in traced)
    assert kernels["rsqrt"] == 0 < plain["rsqrt"]


def attention_of_no_tokens(ops, batch, length, nope, segments):
    """V3's heads are our kernels', those with a `nope` of 64 are cuDNN's."""
    ids_BT = jnp.zeros((batch, length), jnp.int32) if segments else None
    heads = [jnp.zeros((batch, length, *rest), jnp.bfloat16) for rest in ((4, nope + 64), (4, nope + 128), (64,))]
    run = lambda w, *heads: ops.attention_linear(
        "attn.o", *heads, jnp.zeros((2, batch, length, 32)), w, scale=1.0, segment_ids_BT=ids_BT)
    return run, jnp.ones((512, 512)), *heads


def calls(ops):
    """Operations with their arguments for no tokens at all."""
    rows, matrix = jnp.zeros((0, 512), jnp.bfloat16), jnp.ones((512, 512))
    targets, experts = jnp.zeros(0, jnp.int32), ExpertWeights(jnp.ones((3, 512, 1024)), jnp.ones((3, 512, 512)))
    return {
        "attention of no rows": attention_of_no_tokens(ops, 0, 8, 128, False),
        "attention of no rows with segments": attention_of_no_tokens(ops, 0, 8, 128, True),
        "attention of empty rows": attention_of_no_tokens(ops, 2, 0, 128, False),
        "attention of empty rows with segments": attention_of_no_tokens(ops, 2, 0, 128, True),
        "attention of other heads": attention_of_no_tokens(ops, 2, 0, 64, False),
        "linear": (lambda x, w: ops.linear("attn.q_b", x, w), rows, matrix),
        "norm": (lambda x, gain: ops.norm(x, gain, 1e-6), rows, jnp.ones(512)),
        "norm_linear": (lambda x, gain, w: ops.norm_linear(("attn.q_a",), x, gain, (w,), 1e-6),
                        rows, jnp.ones(512), matrix),
        "mlp": (lambda x, *w: ops.mlp(("mlp.gate_up", "mlp.down"), x, *w), rows, jnp.ones((512, 1024)), matrix),
        "moe": (lambda x, gate, w: ops.moe(x, jnp.zeros((0, 2), jnp.int32), gate, w), rows, jnp.zeros((0, 2)), experts),
        "loss": (lambda x, w: ops.loss(x, w, targets, jnp.zeros(0)), rows, matrix),
    }


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "fp8_direct"])
@pytest.mark.parametrize("name", calls(reference_ops()))
def test_no_tokens_give_empty_results_and_gradients_of_zero(monkeypatch, name, recipe):
    """No kernel is left that a CPU could not run."""
    on_h100(monkeypatch)
    bundle = ops.make_ops("require", resolve(recipe))
    monkeypatch.undo()

    def run(ops):
        function, *arguments = calls(ops)[name]
        out, vjp = jax.vjp(function, *arguments)
        cotangent = jax.tree.map(
            lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0), out)
        return out, vjp(cotangent)

    out = jax.jit(lambda: run(bundle))()
    chex.assert_trees_all_equal_shapes_and_dtypes(out, jax.eval_shape(lambda: run(reference_ops())))
    for leaf in jax.tree.leaves(out):
        assert not np.any(leaf)


def test_accepted_shapes_reach_the_kernels(monkeypatch):
    on_h100(monkeypatch)
    bundle = ops.make_ops("require", None)
    monkeypatch.undo()
    attend = jax.jit(lambda *a: bundle.attention_linear(
        "attn.o", *a, jnp.zeros((256, 64)), scale=1.0, segment_ids_BT=None)).trace(*whole_heads(128))
    assert attend.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1
    others = [jnp.zeros((1, 8, 2, width), jnp.bfloat16) for width in (128, 192)]  # keys of 128 with 64 rotary columns
    attend = jax.jit(lambda *a: bundle.attention_linear(
        "attn.o", *others, *a, jnp.zeros((256, 64)), scale=1.0, segment_ids_BT=None)).trace(*whole_heads(128)[2:])
    assert "__cudnn$fmha" in attend.lower(lowering_platforms=("cuda",)).as_text()
    experts = jax.jit(bundle.moe).trace(*ops_tokens(256), ops_weights(256))
    assert experts.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 2
    norm = jax.jit(lambda x, gain: jax.vjp(lambda *both: bundle.norm(*both, 1e-6), x, gain)[1](x)).trace(
        jnp.zeros((2, 8, 256), jnp.bfloat16), jnp.ones(256))
    assert norm.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1
