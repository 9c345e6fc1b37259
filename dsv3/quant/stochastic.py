"""Stochastic rounding: up or down with the probabilities that make the mean right (an option for low-precision state).

Rounding to nearest loses every update smaller than half a step of the format: an average that moves by a thousandth of
itself stalls in bfloat16, whose steps are a hundred-and-twenty-eighth. Rounded stochastically it moves on average.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv3.quant.formats import FLOAT32_SMALLEST_EXPONENT, Format

BFLOAT16 = Format("bfloat16", 8, 7, float(jnp.finfo(jnp.bfloat16).max), True, np.dtype(ml_dtypes.bfloat16))

FLOAT32_MANTISSA = 23
MAGNITUDE = np.uint32(0x7FFF_FFFF)


def round_stochastically(x: jax.Array, fmt: Format, bits: jax.Array) -> jax.Array:
    """float32 array of values of `fmt`: the neighbour above x with probability (x - below) / (above - below).

    `bits` uint32, like x, are uniform (`jax.random.bits`); only the upper 23 - mantissa bits of each decide, but for
    subnormals, where all do. Values of the format stay as they are. Infinities and NaNs are treated as by `round_to`,
    and a finite number never becomes infinite: beyond `largest` it saturates.
    """
    x = x.astype(jnp.float32)
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    behind = FLOAT32_MANTISSA - fmt.mantissa_bits
    # Neighbours in the format are neighbours as integers, also where the exponent changes: add a random part of a step
    # and cut what is behind the point.
    raised = (pattern & MAGNITUDE) + (bits >> (32 - behind))
    cut = raised & ~jnp.uint32(2 ** behind - 1)
    rounded = jax.lax.bitcast_convert_type(cut, jnp.float32)
    if fmt.smallest_exponent > FLOAT32_SMALLEST_EXPONENT:  # its subnormals are equally spaced
        step = 2.0 ** (fmt.smallest_exponent - fmt.mantissa_bits)
        steps = jnp.abs(x) * (1 / step)
        up = (bits >> 8).astype(jnp.float32) * 2.0 ** -24 < steps - jnp.floor(steps)
        rounded = jnp.where(jnp.abs(x) < 2.0 ** fmt.smallest_exponent, (jnp.floor(steps) + up) * step, rounded)
    rounded = jnp.copysign(jnp.minimum(rounded, fmt.largest), x)
    return jnp.where(jnp.isfinite(x), rounded, x if fmt.infinities else jnp.nan)
