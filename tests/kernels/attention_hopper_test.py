"""Attention's forward kernel for Hopper, interpreted on the CPU, against the reference in float32.

Interpretation finishes every product and every copy at once: what must wait for what is reasoned in docs/kernels.md,
and `benchmark attention` compares on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import attention_inputs, interpreted, split
from tiny_models import distance

from dsv3.config import UserError
from dsv3.kernels import attention_backward_hopper, attention_hopper
from dsv3.kernels import attention_tiles_hopper as frame
from dsv3.kernels.attention import causal_attention
from dsv3.kernels.attention_hopper import Settings, forward, refusal

SCALE = 192 ** -0.5
BOUND = 0.004
"""Of o, norm-wise: probabilities and the output are rounded to bfloat16."""


def expected(inputs, segment_ids_BT):
    return causal_attention(*split(*inputs), scale=SCALE, segment_ids_BT=segment_ids_BT)


def run(inputs, segment_ids_BT, how=Settings(64, 3)):
    with interpreted():
        return jax.block_until_ready(forward(*inputs, SCALE, segment_ids_BT, how))


def documents(batch, length, seed=1):
    starts = np.random.default_rng(seed).random((batch, length)) < 4 / length
    return jnp.asarray(np.cumsum(starts, axis=1) + 1, jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize("how", [Settings(128, 2), Settings(128, 2, turns=False), Settings(64, 3)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [256, 203])
def test_agrees_with_the_reference(how, packed, length):
    """Whole tiles, and a length that is a multiple of nothing; memory not written reads as NaN here."""
    inputs = attention_inputs(2, length, 2)
    ids_BT = documents(2, length) if packed else None
    o_BTHU, normaliser_BHT = run(inputs, ids_BT, how)
    assert o_BTHU.dtype == jnp.bfloat16 and o_BTHU.shape == (2, length, 2, 128)
    assert normaliser_BHT.dtype == jnp.float32 and normaliser_BHT.shape == (2, 2, length)
    assert distance(o_BTHU, expected(inputs, ids_BT)) < BOUND
    np.testing.assert_allclose(normaliser_BHT, normaliser(inputs, ids_BT), atol=1e-4)


def normaliser(inputs, ids_BT):
    """log2 of the denominators, in float64."""
    q_nope, q_rope, k_nope, k_rope, _ = (np.asarray(x, np.float64) for x in split(*inputs))
    scores = np.einsum("bthn,bshn->bhts", q_nope, k_nope) + np.einsum("bthr,bsr->bhts", q_rope, k_rope)
    seen = np.tril(np.ones(scores.shape[2:], bool))
    if ids_BT is not None:
        seen = (seen & (np.asarray(ids_BT)[:, :, None] == np.asarray(ids_BT)[:, None]))[:, None]
    return np.log2(np.sum(np.where(seen, np.exp(scores * SCALE), 0), axis=-1))


def test_an_odd_number_of_tiles():
    """The last pair of a long and a short tile is one tile."""
    inputs = attention_inputs(1, 328, 1)
    assert distance(run(inputs, None)[0], expected(inputs, None)) < BOUND


@pytest.mark.slow
def test_segments_in_any_order():
    """Ids that come back: blocks between may be skipped only where nobody sees them."""
    ids_BT = jnp.asarray([[3] * 70 + [1] * 70 + [3] * 60], jnp.int32)
    inputs = attention_inputs(1, 200, 1)
    assert distance(run(inputs, ids_BT)[0], expected(inputs, ids_BT)) < BOUND


def test_a_position_alone_in_its_segment_returns_its_own_value():
    inputs = attention_inputs(1, 72, 1)
    o_BTHU, _ = run(inputs, jnp.arange(72, dtype=jnp.int32)[None] // 2 * 2 + jnp.arange(72)[None] % 2 * 500)
    v_BTHU = split(*inputs)[4]
    np.testing.assert_array_equal(np.asarray(o_BTHU, np.float32), np.asarray(v_BTHU, np.float32))


def test_scores_of_a_thousand_do_not_overflow():
    q, q_rope, kv, k_rope = attention_inputs(1, 136, 1)
    inputs = q * 100, q_rope * 100, kv, k_rope
    o_BTHU, normaliser_BHT = run(inputs, None)
    assert np.isfinite(np.asarray(normaliser_BHT)).all() and np.max(np.asarray(normaliser_BHT)) > 300
    assert distance(o_BTHU, expected(inputs, None)) < BOUND


@pytest.mark.slow
def test_a_nan_stays_with_those_who_see_it():
    """Of a key: later positions of its head. Of a query: its own row. Nothing else changes by a bit."""
    q, q_rope, kv, k_rope = attention_inputs(2, 136, 2)
    clean = np.asarray(run((q, q_rope, kv, k_rope), None)[0], np.float32)
    kv = kv.at[1, 70, 1, 5].set(jnp.nan)
    q = q.at[0, 3, 0, 0].set(jnp.nan)
    found = np.asarray(run((q, q_rope, kv, k_rope), None)[0], np.float32)
    lost = np.zeros(found.shape, bool)
    lost[1, 70:, 1] = lost[0, 3, 0] = True
    np.testing.assert_array_equal(np.isnan(found), lost)
    np.testing.assert_array_equal(found[~lost], clean[~lost])


ids = st.lists(st.integers(0, 5), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(ids, st.booleans(), st.sampled_from([64, 128]))
def test_no_visible_block_is_skipped(runs, ordered, block):
    """Against every pair of positions; with ids in order no block is read for nothing either."""
    ids_T = np.repeat(sorted(runs) if ordered else runs, 37)
    padded = np.asarray(frame.whole_tiles(jnp.asarray(ids_T[None], jnp.int32), mode="edge"))[0]
    first = np.asarray(frame.first_blocks(jnp.asarray(padded[None]), block))[0]
    for tile, found in enumerate(first):
        rows = padded[tile * frame.ROWS:(tile + 1) * frame.ROWS]
        needed = min(np.flatnonzero(padded == own)[0] for own in rows) // block
        assert found <= needed
        if ordered:
            assert found == needed


@pytest.mark.parametrize("how", [Settings(128, 1), Settings(96, 2)], ids=str)
def test_settings_that_cannot_run_are_refused(how):
    with pytest.raises(UserError, match="cannot run"):
        jax.eval_shape(lambda *inputs: forward(*inputs, SCALE, None, how), *attention_inputs(1, 128, 1))


@pytest.mark.parametrize("registers", [attention_hopper.REGISTERS, attention_backward_hopper.REGISTERS])
def test_registers_given_back_are_enough(registers):
    """A warpgroup that asks for more than there are waits for ever."""
    multiply, copy = registers
    assert frame.START_REGISTERS == 65_536 // (128 * (frame.GROUPS + 1)) // 8 * 8
    assert frame.GROUPS * (multiply - frame.START_REGISTERS) <= frame.START_REGISTERS - copy
    assert multiply % 8 == copy % 8 == 0


def test_lowers_for_a_gpu_without_a_copy():
    """At V3's shape, without a GPU: one kernel, and XLA moves nothing around it."""
    shapes = [(1, 4096, 128, 192), (1, 4096, 128, 64), (1, 4096, 128, 256), (1, 4096, 64)]
    function = lambda *inputs: forward(*inputs, SCALE, None, Settings())
    traced = jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@mosaic_gpu") == 1
    assert not [move for move in ("transpose", "concatenate", "pad") if f"stablehlo.{move}" in program]


@pytest.mark.parametrize("widths, dtype, why", [
    ((128, 64, 128), jnp.float32, "float32"), ((64, 64, 128), jnp.bfloat16, "64 + 64 / 128"),
    ((128, 64, 192), jnp.bfloat16, "128 + 64 / 192"),
])
def test_refuses_other_heads(widths, dtype, why):
    assert why in refusal(*widths, dtype)
    assert refusal(128, 64, 128, jnp.bfloat16) is None
