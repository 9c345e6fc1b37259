"""Quantised layouts against `dsv3/quant` to the bit, for any shape, value and operand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import Operand
from dsv3.kernels import quantize, scaled
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.permute import make_plan, permute, permute_tiles
from dsv3.kernels.swiglu import swiglu
from dsv3.kernels.swiglu_quantize import swiglu_backward_quantize, swiglu_quantize
from dsv3.quant import tiles as exact
from dsv3.quant.formats import decode, format_of

INNER = Operand(format="e4m3", tile="inner", power_of_two=False)
BLOCK = Operand(format="e4m3", tile="block", power_of_two=False)
OPERANDS = [Operand(format=fmt, tile=tile, power_of_two=power) for fmt, tile, power in itertools.product(
    ("e4m3", "e5m2", "e5m6"), ("inner", "block", "tensor"), (False, True))]
TILES = {"inner": exact.ALONG_ROWS, "block": exact.BLOCK, "tensor": exact.TENSOR}


def values_of(tiles):
    """As float32, and the scale of every element."""
    return np.asarray(tiles.values, np.float32), np.repeat(np.asarray(tiles.scales).T, 128, axis=1)


def expected(x, operand):
    """`dsv3/quant` on the bare array: values as float32, and the scale of every element."""
    fmt, tile = format_of(operand.format), TILES[operand.tile]
    q = exact.quantize(jnp.asarray(x), fmt, tile, power_of_two=operand.power_of_two)
    rows, columns = tile or x.shape
    scales = np.repeat(np.repeat(np.asarray(q.scales), rows, axis=0), columns, axis=1)[:x.shape[0], :x.shape[1]]
    return np.asarray(decode(q.values, fmt, x.shape[1])), scales


def check(tiles, x, operand):
    values, scales = values_of(tiles)
    m, k = x.shape
    assert values.shape == (scaled.whole(m), scaled.whole(k)) and tiles.scales.dtype == jnp.float32
    wanted, wanted_scales = expected(x, operand)
    np.testing.assert_array_equal(values[:m, :k], wanted)
    np.testing.assert_array_equal(scales[:m, :k], wanted_scales)
    assert (values[m:] == 0).all() and (scales[m:] == 1).all()
    assert (np.nan_to_num(values[:m, k:]) == 0).all()


def random(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, (shape[0], 1))).astype(np.float32)


@pytest.mark.parametrize("operand", OPERANDS, ids=lambda o: f"{o.format}-{o.tile}-{'2' if o.power_of_two else ''}")
def test_rows_and_columns_are_those_of_quant_to_the_bit(operand):
    x = random((130, 200))
    x[5] = 0
    check(quantize.quantize_rows(jnp.asarray(x), operand), x, operand)
    check(quantize.quantize_columns(jnp.asarray(x), operand), x.T, operand)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(OPERANDS), st.sampled_from([(1, 1), (3, 129), (128, 128)]), st.integers(0, 2 ** 32 - 1),
       st.sampled_from([0.0, np.nan, np.inf, -np.inf, 1e-40, 3e38, -448.0]))
def test_special_values_in_any_shape(operand, shape, seed, special):
    x = random(shape, seed)
    x[shape[0] // 2, shape[1] // 2] = special
    check(quantize.quantize_rows(jnp.asarray(x), operand), x, operand)


def test_one_read_gives_both_and_the_second_quantisation_starts_from_the_first():
    x = jnp.asarray(random((70, 150)))
    rows, columns = quantize.quantize_both(x, INNER, BLOCK)
    check(rows, np.asarray(x), INNER)
    check(columns, np.asarray(x).T, BLOCK)
    again = quantize.requantize_columns(rows, INNER)
    check(again, np.asarray(scaled.decode_tiles(rows)).T, INNER)


@pytest.mark.parametrize("tile", ["block", "tensor"])
def test_weights_hold_the_same_values_both_ways(tile):
    """Experts are a stack; each has its own scales."""
    operand = Operand(format="e4m3", tile=tile, power_of_two=False)
    w = np.stack([random((200, 136), seed) for seed in range(3)])
    forward, dgrad = quantize.quantize_weights(jnp.asarray(w), operand)
    assert forward.values.shape == (3, 256, 256) and forward.scales.shape == (3, 2, 2)
    for a, b in zip(forward, dgrad, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32).swapaxes(1, 2), np.asarray(b, np.float32))
    decoded = np.asarray(scaled.decode_blocks(dgrad))
    for e in range(3):
        values, scales = expected(w[e], operand)
        np.testing.assert_array_equal(decoded[e, :200, :136], values * scales)
        assert (decoded[e, 200:] == 0).all() and (decoded[e, :, 136:] == 0).all()


def test_twelve_bits_wait_in_one_and_a_half_bytes():
    operand = Operand(format="e5m6", tile="inner", power_of_two=True)
    x = random((128, 256))
    x[3, 4] = np.nan
    tiles = quantize.quantize_rows(jnp.asarray(x), operand)
    packed = scaled.pack_tiles(tiles, operand)
    assert packed.values.nbytes == 128 * 256 * 3 // 2 and tiles.values.dtype == jnp.bfloat16
    back = scaled.unpack_tiles(packed, operand)
    for a, b in zip(back, tiles, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_fused_forms_are_their_parts():
    x, gain = jnp.asarray(random((50, 200)), jnp.bfloat16), jnp.linspace(0.5, 2, 200)
    rows, columns = quantize.norm_quantize(x, gain, 1e-6, INNER, INNER)
    normed = np.asarray(rms_norm(x, gain, 1e-6), np.float32)
    check(rows, normed, INNER)
    check(columns, normed.T, INNER)
    h, kept = swiglu_quantize(x, INNER, INNER)
    check(h, np.asarray(swiglu(x), np.float32), INNER)
    check(kept, np.asarray(x, np.float32), INNER)
    assert swiglu_quantize(x, INNER, None)[1] is x


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_backward_against_float64(weighted):
    """From gate_up as it was kept; the gate's weight multiplies the gradient and h, and has a gradient itself."""
    rng = np.random.default_rng(0)
    m, f = 70, 100
    gate_up, d_h, weight = rng.standard_normal((m, 2 * f)), rng.standard_normal((m, f)), rng.random(m)
    _, kept = swiglu_quantize(jnp.asarray(gate_up, jnp.float32), INNER, INNER)
    d_h32, weight32 = jnp.asarray(d_h, jnp.float32), jnp.asarray(weight, jnp.float32) if weighted else None
    rows, columns, h_columns, d_weight = swiglu_backward_quantize(kept, d_h32, weight32, INNER, INNER, INNER)
    seen = np.asarray(scaled.decode_tiles(kept), np.float64)[:m, :2 * f]
    gate, up, w = seen[:, :f], seen[:, f:], weight[:, None] if weighted else 1.0
    sigmoid = 1 / (1 + np.exp(-gate))
    h = gate * sigmoid * up
    exact_d = w * np.concatenate([d_h * up * sigmoid * (1 + gate * (1 - sigmoid)), d_h * gate * sigmoid], axis=1)
    decoded = [np.asarray(scaled.decode_tiles(t)) for t in (rows, columns, h_columns)]
    for got, wanted in zip(decoded, (exact_d, exact_d.T, (w * h).T), strict=True):
        got = got[:wanted.shape[0], :wanted.shape[1]]
        assert np.abs(got - wanted).max() <= 2.0 ** -4 * np.abs(wanted).max()
        assert np.linalg.norm(got - wanted) < 0.04 * np.linalg.norm(wanted)
    if weighted:
        np.testing.assert_allclose(d_weight, (h * d_h).sum(axis=1), rtol=1e-4, atol=1e-4)
    else:
        assert d_weight is None


def test_quantised_tokens_travel_as_their_numbers_do():
    """Gathering after quantisation is quantisation after gathering: a row's tiles depend on that row alone."""
    x = jnp.asarray(random((37, 200)))
    topk = jax.lax.top_k(jax.random.uniform(jax.random.key(0), (37, 5)), 2)[1]
    plan, _ = make_plan(topk, 5, 128)
    first = permute_tiles(quantize.quantize_rows(x, INNER), plan)
    then = quantize.quantize_rows(permute(x, plan), INNER)
    for a, b in zip(first, then, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
