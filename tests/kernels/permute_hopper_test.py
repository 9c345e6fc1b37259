"""The Hopper kernels that move rows, interpreted on the CPU, against plain indexing."""

import jax.numpy as jnp
import numpy as np
import pytest
from hopper_kernels import interpreted

from dsv3.config import UserError
from dsv3.kernels.permute import make_plan
from dsv3.kernels.permute_hopper import combine_rows, permute_tiles, piece_of_row
from dsv3.kernels.scaled import Tiles
from dsv3.kernels.stream_hopper import Streaming

TOKENS, WIDTH, CHOICES = 24, 512, 3


def plan_of(n_tokens, n_experts, block):
    """Random choices, of which experts may get none, and as many as `CHOICES` of one token may be the same."""
    topk_TK = np.random.default_rng(2).integers(0, n_experts, (n_tokens, CHOICES))
    return make_plan(jnp.asarray(topk_TK, jnp.int32), n_experts, block)[0]


@pytest.mark.parametrize("n_tokens, n_experts, block, streaming", [
    (TOKENS, 5, 8, Streaming(1, 1, 4, 2)), (TOKENS - 1, 80, 4, Streaming(3, 2, 2, 2)),
    (TOKENS, 5, 8, Streaming(2, 1, 8, 1)), (TOKENS - 1, 3, 16, Streaming(2, 3, 1, 1)),
    (TOKENS, 2, 1, Streaming(2, 1, 4, 2)), (1, 5, 8, Streaming(2, 2, 4, 2)), (TOKENS, 1, 16, Streaming(2, 2, 2, 2))])
def test_tokens_go_to_the_rows_of_their_choices_and_padding_is_zero(n_tokens, n_experts, block, streaming):
    """Numbers of tokens that steps do not divide, more experts than pairs, no padding; quantised rows beyond them."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.standard_normal((n_tokens + 8, WIDTH)), jnp.float8_e4m3fn)
    scales = jnp.asarray(rng.random((WIDTH // 128, n_tokens + 8)), jnp.float32)
    plan = plan_of(n_tokens, n_experts, block)
    actual = interpreted(lambda v, s, plan: permute_tiles(Tiles(v, s), plan, streaming), values, scales, plan)
    pair_J = np.asarray(plan.pair_J)
    real_J, token_J = pair_J < n_tokens * CHOICES, np.minimum(pair_J // CHOICES, n_tokens - 1)
    expected = np.where(real_J[:, None], np.asarray(values)[token_J].view(np.uint8), 0)
    np.testing.assert_array_equal(np.asarray(actual.values).view(np.uint8), expected)
    np.testing.assert_array_equal(actual.scales, np.where(real_J, np.asarray(scales)[:, token_J], 1))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("streaming", [Streaming(1, 1, 512, 3), Streaming(3, 2, 128, 2)])
def test_rows_are_summed_in_float32_in_the_order_of_the_choices(streaming, weighted):
    rng = np.random.default_rng(1)
    rows_JD = jnp.asarray(rng.standard_normal((TOKENS * CHOICES, WIDTH)) * 100, jnp.bfloat16)
    row_TK = rng.permutation(TOKENS * CHOICES).reshape(TOKENS, CHOICES).astype(np.int32)
    weights_TK = (rng.random((TOKENS, CHOICES)) if weighted else np.ones((TOKENS, CHOICES))).astype(np.float32)
    actual = interpreted(
        lambda rows, row, weights: combine_rows(rows, row, weights if weighted else None, streaming),
        rows_JD, row_TK, weights_TK)
    expected_TD = np.zeros((TOKENS, WIDTH), np.float32)
    for k in range(CHOICES):
        expected_TD += np.asarray(rows_JD, np.float32)[row_TK[:, k]] * weights_TK[:, k:k + 1]
    # A fused multiply-add rounds once where this rounds twice: the last bit of a bfloat16 may move.
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected_TD, rtol=2 ** -8, atol=1e-4)
    if not weighted:
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(jnp.asarray(expected_TD, jnp.bfloat16)))


def test_a_nan_moves_with_its_token_only():
    """The last token is what steps beyond the tokens load, too."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.standard_normal((TOKENS, WIDTH)), jnp.float8_e4m3fn).at[[5, TOKENS - 1], 3].set(jnp.nan)
    scales = jnp.ones((WIDTH // 128, TOKENS)).at[1, 5].set(jnp.nan)
    plan = plan_of(TOKENS, 5, 8)
    moved = interpreted(
        lambda v, s, plan: permute_tiles(Tiles(v, s), plan, Streaming(2, 1, 4, 2)), values, scales, plan)
    token_J = np.asarray(plan.pair_J) // CHOICES
    spoiled_J = (token_J == 5) | (token_J == TOKENS - 1)
    expected = spoiled_J[:, None] & (np.arange(WIDTH) == 3)
    np.testing.assert_array_equal(np.isnan(np.asarray(moved.values, np.float32)), expected)
    np.testing.assert_array_equal(np.isnan(moved.scales), np.outer(np.arange(WIDTH // 128) == 1, token_J == 5))


@pytest.mark.parametrize("weighted", [True, False])
def test_a_nan_spoils_the_sums_it_is_in_only(weighted):
    """Of a row, and of a weight, which spoils all of its token."""
    rows_JD = jnp.ones((TOKENS * CHOICES, WIDTH), jnp.bfloat16).at[17, 300].set(jnp.nan)
    row_TK = np.random.default_rng(1).permutation(TOKENS * CHOICES).reshape(TOKENS, CHOICES).astype(np.int32)
    weights_TK = jnp.ones((TOKENS, CHOICES)).at[2, 1].set(jnp.nan)
    y_TD = interpreted(
        lambda rows, row, weights: combine_rows(rows, row, weights if weighted else None, Streaming(3, 2, 128, 2)),
        rows_JD, row_TK, weights_TK)
    expected = (row_TK == 17).any(axis=1)[:, None] & (np.arange(WIDTH) == 300)
    expected[2] |= weighted
    np.testing.assert_array_equal(np.isnan(np.asarray(y_TD, np.float32)), expected)


@pytest.mark.parametrize("d, expected", [(7168, (1024, 8)), (1280, (256, 2)), (128, (128, 1)), (5120, (1024, 8))])
def test_pieces_of_rows_are_read_in_wide_words(d, expected):
    assert piece_of_row(d, 1024) == expected


def test_pieces_that_a_warpgroup_cannot_share_are_refused():
    with pytest.raises(UserError, match="pieces of 64 elements at most; expected at least the 128"):
        combine_rows(jnp.zeros((8, 256), jnp.bfloat16), jnp.zeros((2, 2), jnp.int32), None, Streaming(2, 1, 64))
