"""Training in 8 bits through the Hopper kernels, interpreted on the CPU, against the reference bundle."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_kernels import interpreted
from tiny_models import distance

from dsv3.config import UserError, resolve
from dsv3.config.quant import RECIPES, change_all
from dsv3.kernels.attention import ATTENTION
from dsv3.kernels.fp8_hopper import FAST, hopper_kernels
from dsv3.kernels.fp8_kernels import REFERENCE
from dsv3.kernels.permute import make_plan
from dsv3.kernels.quantized_dot import quantized_dot
from dsv3.kernels.scaled import Tiles
from dsv3.kernels.stream_hopper import NoRoom
from dsv3.model.fp8_ops import fp8_ops
from dsv3.model.ops import ExpertWeights

KIND = "a kind without an entry in the tuning table"
FPROP = resolve("fp8").default.fprop_x
BOUND = 0.01
"""Norm-wise; both sides round to bfloat16 (0.002) and some codes fall to their neighbours."""


def fail(reason):
    raise AssertionError(f"refused: {reason}")


def value_and_gradients(function, cotangent, *arguments):
    out, vjp = jax.vjp(function, *arguments)
    return out, *vjp(cotangent)


def assert_equivalent(run, *arguments):
    """`run(kernels, *arguments)` with the Hopper kernels and with the reference: every array of the result."""
    fast = interpreted(partial(run, hopper_kernels(KIND, ATTENTION, fail)), *arguments)
    slow = jax.jit(partial(run, REFERENCE))(*arguments)
    for got, wanted in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert distance(got, wanted) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2_gradients", "fp8_direct"])
def test_a_linear_of_ragged_widths(name):
    rng, rule = np.random.default_rng(0), resolve(name).default
    x_MK, d_y_MN = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((72, 192), (72, 320)))
    w_KN = jnp.asarray(rng.standard_normal((192, 320)), jnp.float32)

    def run(kernels, x, w, d_y):
        return value_and_gradients(lambda x, w: quantized_dot(x, w, rule, kernels=kernels), d_y, x, w)

    assert_equivalent(run, x_MK, w_KN, d_y_MN)


@pytest.mark.slow
def test_experts():
    """Unequal loads, one expert without rows, a width of one tile and a half: dispatch, both products, SwiGLU, combine,
    and all gradients."""
    rng = np.random.default_rng(1)
    t, d, f, e = 96, 192, 128, 3
    bfloat16, float32 = (partial(jnp.asarray, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    topk_TK = jnp.asarray(np.where(rng.random((t, 2)) < 0.8, 0, 2), jnp.int32)
    h_TD, d_y_TD = bfloat16(rng.standard_normal((t, d))), bfloat16(rng.standard_normal((t, d)))
    gate_TK = float32(rng.random((t, 2)))
    weights = ExpertWeights(float32(rng.standard_normal((e, d, 2 * f)) / 16), float32(rng.standard_normal((e, f, d))))

    def run(kernels, h, gate, weights, d_y):
        ops = fp8_ops(resolve("fp8"), kernels)
        return value_and_gradients(lambda *arguments: ops.moe(arguments[0], topk_TK, *arguments[1:]), d_y,
                                   h, gate, weights)

    assert_equivalent(run, h_TD, gate_TK, weights, d_y_TD)


@pytest.mark.slow
def test_norm_and_two_sites():
    rng = np.random.default_rng(2)
    x, d_a, d_b = (jnp.asarray(rng.standard_normal((1, 64, n)), jnp.bfloat16) for n in (256, 192, 72))
    gain, a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((256,), (256, 192), (256, 72)))

    def run(kernels, x, gain, a, b, d_a, d_b):
        ops = fp8_ops(resolve("fp8"), kernels)
        linear = lambda x, gain, a, b: ops.norm_linear(("attn.q_a", "attn.kv_a"), x, gain, (a, b), 1e-6)
        return value_and_gradients(linear, (d_a, d_b), x, gain, a, b)

    assert_equivalent(run, x, gain, a, b, d_a, d_b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "fp8_without_e5m6"])
def test_attention_and_the_projection_after_it(name):
    """The output of attention waits for both, in 12 bits and in 8."""
    rng = np.random.default_rng(3)
    heads = [jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((1, 72, 3, 48), (1, 72, 3, 96), (1, 72, 16))]
    rotation = jnp.asarray(rng.standard_normal((2, 1, 72, 8)), jnp.float32)
    w, d_y = jnp.asarray(rng.standard_normal((192, 320)), jnp.float32), rng.standard_normal((1, 72, 320))

    def run(kernels, w, d_y, rotation, *heads):
        ops = fp8_ops(resolve(name), kernels)
        attend = lambda w, *heads: ops.attention_linear("attn.o", *heads, rotation, w, scale=0.1, segment_ids_BT=None)
        return value_and_gradients(attend, d_y, w, *heads)

    assert_equivalent(run, w, jnp.asarray(d_y, jnp.bfloat16), rotation, *heads)


def test_every_function_has_a_fast_form():
    """A new member of the bundle that nobody made fast would fall back in silence."""
    assert FAST.keys() | {"products", "attention"} == set(REFERENCE._fields)


@pytest.mark.parametrize("recipe, wanted", [
    (RECIPES["fp8_per_tensor"], "scales by tensor"), (change_all(RECIPES["fp8"], format="e5m6"), "weights in e5m6")])
def test_what_no_kernel_can_do_is_said_and_done_by_the_reference(recipe, wanted):
    rule, reasons = recipe.default, []
    kernels = hopper_kernels(KIND, ATTENTION, reasons.append)
    kernels = kernels._replace(products=REFERENCE.products)
    x, w = jnp.ones((128, 256), jnp.bfloat16), jnp.ones((256, 128), jnp.float32)
    if "weights" in wanted:
        kernels.quantize_weights(w, rule.fprop_w)
    else:
        kernels.quantize_rows(x, rule.fprop_x)
    assert any(wanted in reason for reason in reasons)


TOO_WIDE = {
    "norm_quantize": lambda kernels, x, gain: kernels.norm_quantize(x, gain, 1e-6, FPROP, None),
    "permute_tiles": lambda kernels, x, gain: kernels.permute_tiles(
        Tiles(x.astype(jnp.float8_e4m3fn), gain.reshape(-1, 128, 128)[0]),
        make_plan(jnp.zeros((128, 1), jnp.int32), 1, 128)[0]),
    "combine_rows": lambda kernels, x, gain: kernels.combine_rows(x[:, :1024], jnp.zeros((8, 128), jnp.int32), None),
}


@pytest.mark.parametrize("name", TOO_WIDE)
def test_what_does_not_fit_into_shared_memory_is_refused(name):
    """Mosaic would refuse it at the lowering, in its own words."""
    d, reasons = 131_072, []
    x, gain = jnp.zeros((128, d), jnp.bfloat16), jnp.zeros(d)
    run = partial(TOO_WIDE[name], hopper_kernels(KIND, ATTENTION, reasons.append))
    text = jax.jit(run).trace(x, gain).lower(lowering_platforms=("cuda",)).as_text()
    assert len(reasons) == 1 and reasons[0].startswith(f"{name} of 128x") and "shared memory" in reasons[0]
    assert "mosaic_gpu" not in text


def test_what_just_fits_into_shared_memory_is_not_refused():
    """Mosaic's own count decides: these are the most that it lowers, but for what is kept for reductions."""
    shape, choices, width = jax.ShapeDtypeStruct, 37, 15_872
    combine = lambda choices: jax.jit(lambda x, rows: FAST["combine_rows"].function(x, rows, None)).trace(
        shape((128, 7168), jnp.bfloat16), shape((8, choices), jnp.int32))
    norm = lambda width: jax.jit(lambda x, gain: FAST["norm_quantize"].function(x, gain, 1e-6, FPROP, None)).trace(
        shape((128, width), jnp.bfloat16), shape((width,), jnp.float32))
    for traced in combine(choices), norm(width):
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(NoRoom):
        combine(choices + 1)
    with pytest.raises(NoRoom):
        norm(width + 512)


@pytest.mark.parametrize("formats, fits", [
    (("e5m6", "e4m3", "e4m3", "e4m3"), True), (("e4m3", "e5m6", "e5m6", "e5m6"), True),
    (("e5m6", "e5m6", "e5m6", "e5m6"), False), ((None, "e5m6", "e5m6", "e5m6"), False)], ids=str)
def test_twelve_bits_around_swiglu(formats, fits):
    """Elements twice as wide take one tile at a time where two do not fit, and the reference where one does not."""
    kept, *others = [name and replace(FPROP, format=name) for name in formats]
    reasons = []
    kernels = hopper_kernels(KIND, ATTENTION, reasons.append)

    def run(gate_up, d_h, weight):
        h, waiting = kernels.swiglu_quantize(gate_up, others[0], kept)
        return h, kernels.swiglu_backward_quantize(waiting, d_h, weight, *others)

    shapes = ((256, 512), jnp.bfloat16), ((256, 256), jnp.bfloat16), ((256,), jnp.float32)
    traced = jax.jit(run).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1 + fits
    assert [reason.partition(":")[0] for reason in reasons] == (
        [] if fits else ["swiglu_backward_quantize of 256x512"])


@pytest.mark.parametrize("k", [128, 384, 500, 512])
def test_twelve_bits_of_any_width_are_a_program_for_a_gpu(k):
    """A packed row of an odd number of tiles is no multiple of 128 bytes, which the copy engine wants: refused."""
    rule, reasons = resolve("fp8").rule_of("attn.o"), []
    kernels = hopper_kernels(KIND, ATTENTION, reasons.append)

    def run(x):
        rows, packed = kernels.quantize_and_pack(x, rule.fprop_x, rule.kept)
        return rows, kernels.unpack_both(packed, rule.kept, rule.wgrad_x, jnp.bfloat16)

    traced = jax.jit(run).trace(jax.ShapeDtypeStruct((200, k), jnp.bfloat16))
    kept = 2 if k >= 500 else 0
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == kept
    assert len(reasons) == 2 - kept and all("even number of tiles" in reason for reason in reasons)


def test_the_entry_of_rows_is_their_width():
    assert FAST["norm"].entry(jnp.zeros((2, 3, 256)), jnp.zeros(256), 1e-6) == (256,)


def test_refusals_of_products():
    rule, reasons = resolve("fp8").default, []
    kernels = hopper_kernels(KIND, ATTENTION, reasons.append)
    slow = kernels.products(rule.interval, "hopper"), kernels.products(64, rule.accumulator)
    assert all(products.dot.func is REFERENCE.products(64, "float32").dot.func for products in slow)
    assert len(reasons) == 2 and "accumulator" in reasons[0] and "every 64" in reasons[1]
    rows = REFERENCE.quantize_rows(jnp.ones((128, 128), jnp.bfloat16), replace(rule.fprop_x, format="e5m6"))
    blocks, _ = REFERENCE.quantize_weights(jnp.ones((128, 128), jnp.float32), rule.fprop_w)
    out = kernels.products(rule.interval, rule.accumulator).dot(rows, blocks, (128, 128), jnp.float32)
    assert "bfloat16" in reasons[2]
    np.testing.assert_allclose(out, 128, rtol=1e-6)


def test_a_refusal_may_raise():
    def refuse(reason):
        raise UserError(reason)

    with pytest.raises(UserError, match="float32: they must be bfloat16"):
        hopper_kernels(KIND, ATTENTION, refuse).quantize_rows(jnp.ones((8, 8)), resolve("fp8").default.fprop_x)


def test_what_waited_for_a_float32_model_is_unpacked_by_the_reference():
    rule, reasons = resolve("fp8").rule_of("attn.o"), []
    x = jnp.asarray(np.random.default_rng(0).standard_normal((128, 128)), jnp.float32)
    packed = REFERENCE.quantize_and_pack(x, rule.fprop_x, rule.kept)[1]
    kernels = hopper_kernels(KIND, ATTENTION, reasons.append)
    decoded, _ = kernels.unpack_both(packed, rule.kept, rule.wgrad_x, jnp.float32)
    assert len(reasons) == 1 and "float32" in reasons[0]
    assert decoded.dtype == jnp.float32 and 0 < distance(decoded, x) < 2.0 ** -7
