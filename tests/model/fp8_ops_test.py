"""The bundle in 8 bits: its operations against simple compositions, its sites against its recipe."""

import dataclasses
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILY, distance, random_batch, random_variables
from tiny_recipe import motley, seen

from dsv3.config import Site, UserError, resolve
from dsv3.config.quant import change_all
from dsv3.inference.cache import empty_caches
from dsv3.kernels.attention import ATTENTION, Attention, Heads
from dsv3.kernels.fp8_kernels import REFERENCE
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.quantized_dot import quantized_dot
from dsv3.model.fp8_ops import fp8_ops
from dsv3.model.ops import ExpertWeights, reference_ops
from dsv3.model.transformer import Transformer
from dsv3.parallel import ops as parallel
from dsv3.parallel.ops import make_ops, text_ops

FP8 = resolve("fp8")
MOTLEY = replace(FP8, sites=(Site(pattern="*.gate_up", rule=motley(FP8.default)),
                             Site(pattern="*.down", rule=motley(FP8.default, 1))))
T, D, F, E, K = 40, 72, 48, 5, 2


def swiglu_and_gradient(gate_up, d_h):
    """h and d_gate_up, in float64."""
    gate, up = np.split(gate_up, 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    d_gate = d_h * up * sigmoid * (1 + gate * (1 - sigmoid))
    return gate * sigmoid * up, np.concatenate([d_gate, d_h * gate * sigmoid], axis=-1)


def moe_problem(seed=0):
    rng = np.random.default_rng(seed)
    topk = np.array([rng.permutation(E - 1)[:K] for _ in range(T)], np.int32)  # nobody visits the last expert
    arrays = [rng.standard_normal(shape) for shape in ((T, D), (T, K), (E, D, 2 * F), (E, F, D), (T, D))]
    h, gate, w_up, w_down, d_y = (array.astype(np.float32) for array in arrays)
    return h, topk, np.abs(gate), w_up / 8, w_down / 8, d_y


def expert_by_expert(recipe, h, topk, gate, w_up, w_down, d_y):
    """y and all gradients, as a loop over experts on the operands that the recipe names."""
    up, down = recipe.rule_of("experts.gate_up"), recipe.rule_of("experts.down")
    y, d_h, d_gate = np.zeros_like(h, np.float64), np.zeros_like(h, np.float64), np.zeros_like(gate, np.float64)
    d_up, d_down = np.zeros_like(w_up, np.float64), np.zeros_like(w_down, np.float64)
    kept = lambda x, operand: np.asarray(x, np.float64) if operand is None else seen(x, operand)
    x, waiting, d_rows = seen(h, up.fprop_x), kept(h, up.kept), seen(d_y, down.dgrad_dy)
    for e in range(E):
        t, k = np.nonzero(topk == e)
        if len(t) == 0:
            continue
        gate_up = x[t] @ seen(w_up[e], up.fprop_w)
        out = seen(swiglu_and_gradient(gate_up, 0)[0], down.fprop_x) @ seen(w_down[e], down.fprop_w)
        w = gate[t, k][:, None].astype(np.float64)
        np.add.at(y, t, w * out)
        d_hidden = d_rows[t] @ seen(w_down[e], down.dgrad_w).T
        hidden, d_gate_up = swiglu_and_gradient(kept(gate_up, recipe.swiglu_kept), w * d_hidden)
        d_gate[t, k] = (hidden * d_hidden).sum(axis=1)
        np.add.at(d_h, t, seen(d_gate_up, up.dgrad_dy) @ seen(w_up[e], up.dgrad_w).T)
        d_down[e] = seen((w * hidden).T, down.wgrad_x) @ seen(d_rows[t].T, down.wgrad_dy).T
        d_up[e] = seen(waiting[t].T, up.wgrad_x) @ seen(d_gate_up.T, up.wgrad_dy).T
    return y, d_h, d_gate, d_up, d_down


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [
    FP8, resolve("fp8_direct"), resolve("fp8_e5m2_gradients"), replace(FP8, swiglu_kept=None),
    replace(FP8, swiglu_kept=resolve("fp8").rule_of("attn.o").kept), MOTLEY,
], ids=["fp8", "direct", "e5m2 gradients", "swiglu kept whole", "swiglu kept in 12 bits", "no two alike"])
def test_experts_are_a_loop_over_experts(recipe):
    """Tokens quantised once, the gate's weight joining at the SwiGLU, rows in blocks of 128: none of it shows."""
    h, topk, gate, w_up, w_down, d_y = moe_problem()

    @jax.jit
    def run(h, gate, w_up, w_down, d_y):
        moe = lambda h, gate, w_up, w_down: fp8_ops(recipe).moe(h, jnp.asarray(topk), gate, ExpertWeights(w_up, w_down))
        y, vjp = jax.vjp(moe, h, gate, w_up, w_down)
        return y, *vjp(d_y)

    got = run(h, gate, w_up, w_down, d_y)
    wanted = expert_by_expert(recipe, h, topk, gate, w_up, w_down, d_y)
    for name, actual, expected in zip(("y", "d_h", "d_gate", "d_up", "d_down"), got, wanted, strict=True):
        # A value in float32 and one in float64 may fall on two sides of a rounding; that is rare.
        assert distance(actual, expected) < 2e-3, name
    assert (np.asarray(got[3])[E - 1] == 0).all() and (np.asarray(got[4])[E - 1] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("recipe, bound", [(replace(FP8, sites=()), 6e-2), (MOTLEY, 0.1)], ids=["fp8", "no two alike"])
def test_a_dense_network_is_one_expert_that_everyone_visits(recipe, bound):
    """`mlp` and `moe` under one rule, all tokens to one expert with weight 1."""
    h, _, _, w_up, w_down, d_y = moe_problem(1)
    ops, topk, ones = fp8_ops(recipe), jnp.zeros((T, 1), jnp.int32), jnp.ones((T, 1))

    def run(function):
        y, vjp = jax.vjp(function, h, w_up[0], w_down[0])
        return y, *vjp(d_y)

    dense = jax.jit(lambda: run(lambda h, up, down: ops.mlp(("mlp.gate_up", "mlp.down"), h, up, down)))()
    moe = jax.jit(lambda: run(lambda h, up, down: ops.moe(h, topk, ones, ExpertWeights(up[None], down[None]))))()
    for a, b, bound in zip(dense, moe, (0, 0, 0, bound), strict=True):  # moe quantises dy twice for the last
        assert distance(a, b) < bound + 1e-4  # a sum in another order now and then moves a code


@pytest.mark.parametrize("rule", [FP8.default, motley(FP8.default)], ids=["fp8", "no two alike"])
def test_sites_of_one_rule_share_one_product_and_give_what_each_gives_alone(rule):
    """Widths that fill no tile; outputs and weight gradients to the last bit, the input's gradient but for its sum."""
    base = replace(FP8, default=rule)
    rng = np.random.default_rng(0)
    x, gain = rng.standard_normal((2, 20, D)).astype(np.float32), np.linspace(0.5, 2, D, dtype=np.float32)
    weights = tuple(rng.standard_normal((D, n)).astype(np.float32) for n in (130, 60))
    cotangents = tuple(rng.standard_normal((2, 20, n)).astype(np.float32) for n in (130, 60))

    def alone(x, gain, weights):
        normed = rms_norm(x, gain, 1e-6)
        return tuple(quantized_dot(normed, w, rule) for w in weights)

    def together(x, gain, weights, recipe=base):
        return fp8_ops(recipe).norm_linear(("attn.q_a", "attn.kv_a"), x, gain, weights, 1e-6)

    def run(function):
        @jax.jit
        def compiled(*inputs):
            y, vjp = jax.vjp(function, *inputs)
            return y, *vjp(cotangents)

        return compiled(x, gain, weights)

    (y, d_x, d_gain, d_w), wanted = run(together), run(alone)
    for got, expected in zip((*y, *d_w), (*wanted[0], *wanted[3]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    assert distance(d_x, wanted[1]) < 1e-6 and distance(d_gain, wanted[2]) < 1e-5
    late = replace(change_all(FP8, tile="tensor").default, interval=256, accumulator="hopper")
    traced = str(jax.make_jaxpr(lambda: together(x, gain, weights, recipe=replace(FP8, sites=(), default=late)))())
    assert traced.count("custom_vjp_call") > str(jax.make_jaxpr(lambda: together(x, gain, weights))()).count(
        "custom_vjp_call")  # each by itself: side by side, scales would change within an interval
    mixed = replace(base, sites=(Site(pattern="attn.kv_a", rule=None),))
    (q, kv), *_ = run(lambda *args: together(*args, recipe=mixed))
    np.testing.assert_allclose(q, wanted[0][0], rtol=1e-6, atol=1e-5)
    assert distance(kv, np.asarray(rms_norm(x, gain, 1e-6)) @ weights[1]) < 1e-6


@pytest.mark.parametrize("name", ["fp8", "fp8_without_e5m6", "fp8_direct"])
def test_attention_is_given_its_output_as_it_waited(name):
    """In 12 bits with scales that are powers of two, in E4M3, or, where nothing is kept, as it was."""
    recipe, outputs = resolve(name), []
    rng = np.random.default_rng(0)
    shapes = (2, 9, 3, 14), (2, 9, 3, 11), (2, 9, 8), (2, 2, 9, 4)
    *heads, rotation = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    w = jnp.asarray(rng.standard_normal((15, 30)), jnp.float32)

    def backward(heads, rotation, scale, segments, o, residuals, d_o):
        outputs.append(o)
        return ATTENTION.backward(heads, rotation, scale, segments, o, residuals, d_o)

    ops = fp8_ops(recipe, REFERENCE._replace(attention=Attention(ATTENTION.forward, backward)))
    attend = lambda *a: ops.attention_linear("attn.o", *a, scale=0.3, segment_ids_BT=None)
    y, vjp = jax.vjp(attend, *heads, rotation, w)
    *d_heads, d_rotation, d_w = vjp(jnp.ones_like(y))
    assert not np.any(d_rotation)
    o, _ = ATTENTION.forward(Heads(*heads), rotation, 0.3, None)
    flat, rule = np.asarray(o).reshape(18, 15), recipe.rule_of("attn.o")
    kept = flat if rule.kept is None else seen(flat, rule.kept)
    np.testing.assert_allclose(np.asarray(outputs[0]).reshape(18, 15), kept, rtol=1e-6)
    assert distance(y.reshape(18, 30), seen(flat, rule.fprop_x) @ seen(w, rule.fprop_w)) < 1e-6
    d_flat = np.ones((18, 30))
    assert distance(d_w, seen(kept.T, rule.wgrad_x) @ seen(d_flat.T, rule.wgrad_dy).T) < 1e-6
    d_o = jnp.asarray(seen(d_flat, rule.dgrad_dy) @ seen(w, rule.dgrad_w).T, jnp.float32).reshape(o.shape)
    expected = ATTENTION.backward(Heads(*heads), rotation, 0.3, None, o, (), d_o)
    for got, wanted in zip(d_heads, expected, strict=True):
        assert distance(got, wanted) < 1e-5


def model(recipe, **changes):
    return Transformer(dataclasses.replace(FAMILY["v3"], **changes), make_ops("reference", recipe))


def test_a_recipe_that_names_no_place_is_the_model_in_its_own_dtype():
    nothing = replace(FP8, sites=(Site(pattern="*", rule=None),))
    variables, batch = random_variables(FAMILY["v3"]), random_batch(FAMILY["v3"])
    program = lambda ops: re.sub(
        "0x[0-9a-f]+", "", str(jax.make_jaxpr(Transformer(FAMILY["v3"], ops).apply)(variables, batch)))
    assert program(fp8_ops(nothing)) == program(reference_ops()) != program(fp8_ops(FP8))


@pytest.mark.slow
def test_logits_stay_near_those_of_the_unquantised_model():
    """Within a sixth, for a miniature of 3 layers with matrices 30 times as wide as the report's, and not equal."""
    config = dataclasses.replace(FAMILY["v3"], dtype="bfloat16", init_std=0.1)
    variables, batch = random_variables(config), random_batch(config)
    plain, quantised = (
        jax.jit(partial(model(recipe, dtype="bfloat16", init_std=0.1).apply, method="forward"))(variables, batch)[0]
        for recipe in (None, FP8))
    assert 0.01 < distance(quantised, plain) < 0.17


@pytest.mark.slow
def test_recomputation_changes_no_gradient():
    """What a policy keeps, and what it makes again from it, are the same quantised tensors."""
    variables, batch = random_variables(FAMILY["v3"]), random_batch(FAMILY["v3"])
    grads = []
    for policy in ("none", "report"):
        loss = lambda params, policy=policy: model(FP8, remat=policy).apply(
            variables | {"params": params}, batch).main
        grads.append(jax.jit(jax.grad(loss))(variables["params"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *grads)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_activation_reaches_the_loss(bad):
    """One element of one token's embedding: the loss of its row is no number, in 8 bits as in 16."""
    variables, batch = random_variables(FAMILY["v3"]), random_batch(FAMILY["v3"])
    embed = variables["params"]["embed"].at[batch.tokens_BT[0, 2], 3].set(bad)
    losses = jax.jit(model(FP8).apply)(variables | {"params": variables["params"] | {"embed": embed}}, batch)
    assert not np.isfinite(losses.main) and not np.isfinite(losses.mtp_D).any()


@pytest.mark.slow
def test_text_comes_from_the_quantised_model():
    """Prefill over the latent cache is the forward pass by the same recipe, where the absorbed `kv_b` is in none."""
    recipe = replace(FP8, sites=(Site(pattern="attn.kv_b", rule=None), *FP8.sites))
    variables, batch = random_variables(FAMILY["v3"]), random_batch(FAMILY["v3"])
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    decode = lambda ops: jax.jit(lambda: Transformer(FAMILY["v3"], ops).apply(
        variables, batch.tokens_BT, positions, empty_caches(FAMILY["v3"], 2, 16), method="decode"))()[0]
    forward = jax.jit(lambda: model(recipe).apply(variables, batch, method="forward")[0])()
    assert distance(decode(text_ops(recipe)), forward) < 0.02 < distance(decode(text_ops(None)), forward)


def test_a_hopper_gpu_gets_the_fast_forms_and_a_refusal_in_one_line(monkeypatch):
    """Nothing is missing when the bundle is built; an activation that no kernel takes is a warning, or an error."""
    h100, warnings = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="H100"), []
    monkeypatch.setattr(parallel.jax, "devices", lambda: [h100])
    monkeypatch.setattr(parallel.logging, "warning", lambda message, *values: warnings.append(message % values))
    auto, required, reference = (
        make_ops(name, FP8).linear.args[0].kernels for name in ("auto", "require", "reference"))
    assert reference == REFERENCE and not warnings
    fast = {name for name in REFERENCE._fields if getattr(auto, name) != getattr(REFERENCE, name)}
    assert fast == set(REFERENCE._fields)
    x, operand = jnp.ones((8, 8), jnp.float32), FP8.default.fprop_x
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, auto.quantize_rows(x, operand), REFERENCE.quantize_rows(x, operand))
    assert len(warnings) == 1 and "activations in float32" in warnings[0]
    with pytest.raises(UserError, match="no Hopper kernel for activations in float32"):
        required.quantize_rows(x, operand)
    monkeypatch.undo()
    with pytest.raises(UserError, match="kernels=require needs a Hopper GPU"):
        make_ops("require", FP8)
