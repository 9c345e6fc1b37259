"""Rotary positions and YaRN against the published figures."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILY, distance

from dsv3.config import AttentionConfig, YarnConfig
from dsv3.kernels.rotate import rotate
from dsv3.model import rope

V3 = AttentionConfig(
    n_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    rope_theta=10000.0, yarn=None, norm_eps=1e-6)
V3_YARN = dataclasses.replace(V3, yarn=YarnConfig(
    factor=40.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0))
V2_YARN = dataclasses.replace(V3_YARN, yarn=dataclasses.replace(V3_YARN.yarn, mscale=0.707, mscale_all_dim=0.707))


@pytest.mark.parametrize("attention, expected", [(V3, 0.0721688), (V3_YARN, 0.1352338), (V2_YARN, 0.1147214)])
def test_softmax_scale_of_the_released_models(attention, expected):
    assert rope.softmax_scale(attention) == pytest.approx(expected, abs=5e-8)


def test_yarn_leaves_pairs_below_10_and_stretches_pairs_from_23_by_40():
    plain, stretched = rope.frequencies(V3), rope.frequencies(V3_YARN)
    np.testing.assert_allclose(plain, 10000.0 ** (-np.arange(32) / 32))
    np.testing.assert_allclose(stretched[:11], plain[:11])
    np.testing.assert_allclose(stretched[23:], plain[23:] / 40)
    assert np.all(np.diff(plain[10:24] / stretched[10:24]) > 0)


@pytest.mark.parametrize("name", ["v3", "v3_yarn", "yarn_unequal_mscale"])
def test_frequencies_amplitude_and_scale_agree_with_the_oracle(name):
    attention = FAMILY[name].attention
    frequencies, amplitude, scale = oracle.rope_frequencies(attention)
    np.testing.assert_allclose(rope.frequencies(attention), frequencies, rtol=1e-12)
    assert rope.amplitude(attention) == pytest.approx(amplitude)
    assert rope.softmax_scale(attention) == pytest.approx(scale)


def test_one_equal_fast_and_slow_threshold_is_a_step():
    """Kimi-K2 has beta_fast = beta_slow = 1: the ramp must not divide by zero."""
    yarn = dataclasses.replace(V3_YARN.yarn, beta_fast=1.0, beta_slow=1.0, factor=32.0)
    frequencies = rope.frequencies(dataclasses.replace(V3, rope_theta=50000.0, yarn=yarn))
    assert np.all(np.isfinite(frequencies)) and np.all(np.diff(frequencies) < 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 3000))
def test_scores_depend_on_the_distance_only(query_at, key_at, shift):
    rng = np.random.default_rng(query_at)
    q, k = rng.standard_normal((2, 1, 1, 64)).astype(np.float32)

    def score(query_position, key_position):
        turned = [rotate(jnp.asarray(x), rope.rotation(V3, jnp.array([[position]])))
                  for x, position in ((q, query_position), (k, key_position))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(query_at, key_at) == pytest.approx(score(query_at + shift, key_at + shift), abs=0.02)


def test_rotate_keeps_head_axes_and_agrees_with_the_oracle():
    attention = FAMILY["v3"].attention
    x = np.random.default_rng(0).standard_normal((2, 7, 3, 8))
    rotated = rotate(jnp.asarray(x, jnp.float32), rope.rotation(attention, jnp.arange(7)[None].repeat(2, 0)))
    frequencies, amplitude, _ = oracle.rope_frequencies(attention)
    for row in range(2):
        for head in range(3):
            expected = oracle.rotate_interleaved(x[row, :, head], np.arange(7), frequencies, amplitude)
            assert distance(rotated[row, :, head], expected) < 1e-6
