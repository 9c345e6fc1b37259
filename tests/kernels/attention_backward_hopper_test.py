"""Attention's backward kernels for Hopper, interpreted on the CPU, against the reference's gradients in float32.

Interpretation finishes every product and every copy at once: what must wait for what is reasoned in docs/kernels.md,
and `benchmark attention` compares on a GPU.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import attention_inputs, interpreted, split
from jax.experimental import pallas as pl
from tiny_models import distance

from dsv3.config import UserError
from dsv3.kernels import attention_hopper
from dsv3.kernels import attention_tiles_hopper as frame
from dsv3.kernels.attention import causal_attention
from dsv3.kernels.attention_backward_hopper import BLOCK, Settings, backward
from dsv3.kernels.attention_kept_hopper import QUERIES, Kept

SCALE = 192 ** -0.5
BOUND = 0.006
"""Of gradients, norm-wise: P and dS are rounded to bfloat16, and so is every head's part of d_k_rope."""


@jax.jit
def expected(inputs, segment_ids_BT, d_o_BTHU):
    """d_q with the rotary part's gradient in its place, d_kv and d_k_rope."""
    attend = lambda *parts: causal_attention(*parts, scale=SCALE, segment_ids_BT=segment_ids_BT)
    d_q, d_q_rope, d_k, d_k_rope, d_v = jax.vjp(attend, *split(*inputs))[1](d_o_BTHU.astype(jnp.float32))
    return jnp.concatenate([d_q, d_q_rope], -1), jnp.concatenate([d_k, d_v], -1), d_k_rope


def run(inputs, segment_ids_BT, d_o_BTHU, how=Settings()):
    with interpreted():
        o_BTHU, normaliser_BHT = attention_hopper.forward(
            *inputs, SCALE, segment_ids_BT, attention_hopper.Settings(64, 3))
        return jax.block_until_ready(backward(*inputs, SCALE, segment_ids_BT, o_BTHU, normaliser_BHT, d_o_BTHU, how))


def cotangent(inputs, seed=9):
    shape = *inputs[0].shape[:3], 128
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def assert_agree(inputs, ids_BT, how=Settings()):
    d_o_BTHU = cotangent(inputs)
    found, wanted = run(inputs, ids_BT, d_o_BTHU, how), expected(inputs, ids_BT, d_o_BTHU)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == jnp.bfloat16 and got.shape == want.shape
        assert distance(got, want) < BOUND
    for part in (slice(0, 128), slice(128, None)):  # of d_q and d_kv: neither hides behind the other
        assert max(distance(got[..., part], want[..., part]) for got, want in zip(found[:2], wanted[:2])) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("how, length, packed", [
    (Settings(), 256, False), (Settings(), 203, True), (Settings(2, False, 2, True, kept_gib=0), 203, False)], ids=str)
def test_agrees_with_the_reference(how, length, packed):
    """Whole tiles, and a length that is a multiple of nothing, in documents; dS kept and made again."""
    starts = np.random.default_rng(1).random((2, length)) < 4 / length
    ids_BT = jnp.asarray(np.cumsum(starts, axis=1) + 1, jnp.int32) if packed else None
    assert_agree(attention_inputs(2, length, 2), ids_BT, how)


@pytest.mark.slow
def test_differences_that_are_kept_give_the_same_gradients_of_keys():
    """To the bit; and d_q within its rounding, at a length whose last tile of queries is not whole."""
    inputs = attention_inputs(1, 328, 1)
    d_o_BTHU = cotangent(inputs)
    kept, again = (run(inputs, None, d_o_BTHU, Settings(kept_gib=gib)) for gib in (1, 0))
    for got, want in zip(kept[1:], again[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    assert 0 < distance(kept[0], again[0]) < BOUND  # another rounding of P, so another path
    assert distance(kept[0], expected(inputs, None, d_o_BTHU)[0]) < BOUND


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2000))
@settings(max_examples=40, deadline=None)
def test_squares_fill_their_room_one_after_the_other(batch, heads, length):
    kept = Kept(heads, pl.cdiv(length, BLOCK))
    pairs = [(half, block) for half in range(pl.cdiv(length, frame.ROWS) * frame.GROUPS)
             for block in range(half // frame.GROUPS * frame.GROUPS, kept.blocks)]
    assert kept.squares() == len(pairs)
    for b, h in itertools.product(range(batch), range(heads)):
        for place in range(0, len(pairs), max(1, len(pairs) // 20)):
            assert int(kept.row(b, h, *pairs[place])) == ((b * heads + h) * len(pairs) + place) * BLOCK
    gib = batch * heads * len(pairs) * BLOCK * BLOCK * 2 / 2**30
    assert Kept.within(gib, batch, heads, length) == kept and Kept.within(0.999 * gib, batch, heads, length) is None


@pytest.mark.slow
def test_an_odd_number_of_tiles_and_segments_in_any_order():
    ids_BT = jnp.asarray([[3] * 130 + [1] * 100 + [3] * 60], jnp.int32)
    assert_agree(attention_inputs(1, 290, 1), ids_BT)


@pytest.mark.slow
def test_scores_of_a_thousand():
    q, q_rope, kv, k_rope = attention_inputs(1, 136, 1)
    inputs = q * 100, q_rope * 100, kv, k_rope
    d_o_BTHU = cotangent(inputs)
    found = run(inputs, None, d_o_BTHU)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
    d_v = expected(inputs, None, d_o_BTHU)[1][..., 128:]  # the others are differences of nearly equal numbers
    assert distance(found[1][..., 128:], d_v) < BOUND


@pytest.mark.slow
def test_a_position_alone_in_its_segment():
    """P is 1 and dS is 0: d_v is d_o to the bit, and what is left of d_k and d_q is the rounding of o in delta."""
    inputs = attention_inputs(1, 72, 1)
    d_o_BTHU = cotangent(inputs)
    d_q, d_kv, d_k_rope = run(inputs, jnp.arange(72, dtype=jnp.int32)[None], d_o_BTHU)
    np.testing.assert_array_equal(np.asarray(d_kv[..., 128:], np.float32), np.asarray(d_o_BTHU, np.float32))
    assert all(np.max(np.abs(np.asarray(x, np.float32))) < 1e-3 for x in (d_q, d_kv[..., :128], d_k_rope))


@pytest.mark.slow
def test_a_nan_stays_with_its_head_and_its_tiles():
    """Of d_o at position 140: its own d_q, and keys up to the end of its tile. All else keeps its bits.

    A product by a P of 0 is still NaN, so keys later in the same tile of 128 are lost, as the reference loses all.
    """
    inputs = attention_inputs(1, 264, 2)
    d_o_BTHU = cotangent(inputs)
    clean = run(inputs, None, d_o_BTHU)
    found = run(inputs, None, d_o_BTHU.at[0, 140, 1, 7].set(jnp.nan))
    lost_q, lost_kv = np.zeros(found[0].shape, bool), np.zeros(found[1].shape, bool)
    lost_q[0, 140, 1], lost_kv[0, :256, 1] = True, True
    for got, before, lost in zip(found[:2], clean[:2], (lost_q, lost_kv), strict=True):
        got, before = np.asarray(got, np.float32), np.asarray(before, np.float32)
        assert np.isnan(got[lost & (np.arange(got.shape[1]) <= 140)[None, :, None, None]]).any()
        np.testing.assert_array_equal(got[~lost], before[~lost])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.booleans())
def test_no_block_of_queries_that_sees_a_key_is_skipped(runs, ordered):
    ids_T = np.repeat(sorted(runs) if ordered else runs, 37)
    padded = np.asarray(frame.whole_tiles(jnp.asarray(ids_T[None], jnp.int32), mode="edge"))
    last = np.asarray(frame.last_blocks(jnp.asarray(padded), BLOCK, len(ids_T)))[0]
    for tile, found in enumerate(last):
        keys = padded[0, tile * frame.ROWS:(tile + 1) * frame.ROWS]
        needed = max(np.flatnonzero(ids_T == own)[-1] for own in keys) // BLOCK
        assert needed <= found <= (len(ids_T) - 1) // BLOCK
        if ordered:
            assert found == needed


def test_settings_that_would_hang_are_refused():
    inputs = attention_inputs(1, 128, 1)
    o_BTHU = cotangent(inputs)
    with pytest.raises(UserError, match="wait for ever"):
        backward(*inputs, SCALE, None, o_BTHU, jnp.zeros((1, 1, 128)), o_BTHU, Settings(d_kv_stages=1))


def test_lowers_for_a_gpu_without_a_copy():
    """At V3's shape, without a GPU: two kernels; XLA adds delta, turns it round, and sums d_k_rope over heads.

    What is kept between them is no longer than its triangle.
    """
    wide = [(1, 4096, 128, width) for width in (192, 64, 256)] + [(1, 4096, 64)]
    shapes = [*wide, (1, 4096, 128, 128), (1, 128, 4096), (1, 4096, 128, 128)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) == 3 and shape[1] == 128 else jnp.bfloat16)
              for shape in shapes]
    function = lambda q, q_rope, kv, k_rope, *rest: backward(q, q_rope, kv, k_rope, SCALE, None, *rest, Settings())
    program = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@mosaic_gpu") == 2
    assert f"tensor<{128 * 33 * 64 * 64 + QUERIES}x64xbf16>" in program
    assert program.count("stablehlo.transpose") == 1  # of delta
    assert "stablehlo.concatenate" not in program and "stablehlo.slice" not in program
