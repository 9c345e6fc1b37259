"""Rotary positions: tables for `dsv3.kernels.rotate`, YaRN frequencies, and the softmax scale that goes with them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import AttentionConfig, YarnConfig


def _yarn_ramp(attention: AttentionConfig, yarn: YarnConfig) -> np.ndarray:
    """0 for pairs that keep their frequency, 1 for those slowed by `factor`, linear between; [R / 2]."""
    dim = attention.qk_rope_head_dim

    def pair_of(rotations: float) -> float:
        """The (fractional) pair that makes `rotations` turns within the original context."""
        turns = yarn.original_seq_len / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(attention.rope_theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)


def _mscale(factor: float, coefficient: float) -> float:
    """0.1 c ln(factor) + 1: what YaRN multiplies lengths by to keep the entropy of the softmax."""
    return 0.1 * coefficient * math.log(factor) + 1


def frequencies(attention: AttentionConfig) -> np.ndarray:
    """Radians per position of every pair, float64 [R / 2]: theta^(-2j / R), stretched by YaRN where configured."""
    dim = attention.qk_rope_head_dim
    plain = attention.rope_theta ** (-np.arange(0, dim, 2) / dim)
    if attention.yarn is None:
        return plain
    ramp = _yarn_ramp(attention, attention.yarn)
    return plain / attention.yarn.factor * ramp + plain * (1 - ramp)


def amplitude(attention: AttentionConfig) -> float:
    """What YaRN multiplies cosines and sines by: 1 wherever `mscale` equals `mscale_all_dim`, as in V2 and V3."""
    yarn = attention.yarn
    return 1.0 if yarn is None else _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(attention: AttentionConfig) -> float:
    """(N + R)^-1/2, times mscale_all_dim's factor squared under YaRN.

    V3 at 4K: 0.0721688; with its YaRN: 0.1352338. The report's section 4.3 writes the square root of the factor;
    released code multiplies the logits by its square.
    """
    base = attention.qk_head_dim ** -0.5
    yarn = attention.yarn
    return base if yarn is None else base * _mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def rotation(attention: AttentionConfig, positions_BT: jax.Array) -> jax.Array:
    """cos and sin of every position and pair, float32 [2, B, T, R / 2]."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies(attention).astype(np.float32)[None, None]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * amplitude(attention)
