"""Number formats of 8 and 12 bits: rounding to them, and the codes that store them (report section 3.3).

| format | sign, exponent, mantissa | largest | smallest normal, subnormal | infinities | NaN |
|---|---|---|---|---|---|
| E4M3 | 1, 4, 3 | 448 | 2^-6, 2^-9 | none | 1 code per sign |
| E5M2 | 1, 5, 2 | 57,344 | 2^-14, 2^-16 | yes | 3 codes per sign |
| E5M6 | 1, 5, 6 | 65,024 | 2^-14, 2^-20 | yes | 63 codes per sign |

Rounding is to nearest, ties to even, with subnormals. Finite values beyond the largest saturate, as Hopper's own
conversions do. Infinities and NaNs stay, or become NaN where the format has no infinity: a bad number must
not come out as a good one. The report only names E5M6; here it is the upper 12 bits of an IEEE half.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv3.config import require


@dataclass(frozen=True)
class Format:
    """A binary floating-point format. `dtype` stores one element, or is wider; None: elements are packed (`pack`).

    `largest` is what a tile is scaled to, and may be less than the bits could hold. Raises `UserError` for a `dtype`
    that cannot hold the numbers, and for None in any format but E5M6, the only one with a packed layout.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    infinities: bool
    dtype: np.dtype | None

    def __post_init__(self) -> None:
        if self.dtype is None:
            require((self.exponent_bits, self.mantissa_bits) == (5, 6), f"format {self.name!r} has no dtype, and only "
                    "E5M6 has a packed layout; give it a dtype that holds its numbers, such as bfloat16")
            return
        held = ml_dtypes.finfo(self.dtype)
        require(held.nmant >= self.mantissa_bits and held.minexp <= self.smallest_exponent
                and float(held.max) >= self.largest,
                f"format {self.name!r} does not fit into {self.dtype.name}; give it a dtype that holds its numbers")

    @property
    def smallest_exponent(self) -> int:
        """That of the smallest normal number."""
        return 2 - 2 ** (self.exponent_bits - 1)

    def bytes_of(self, elements: int) -> int:
        """Storage of the last axis: E5M6 packs two elements into three bytes."""
        return elements * self.dtype.itemsize if self.dtype is not None else 3 * -(-elements // 2)


E4M3 = Format("e4m3", 4, 3, 448.0, False, np.dtype(ml_dtypes.float8_e4m3fn))
E5M2 = Format("e5m2", 5, 2, 57344.0, True, np.dtype(ml_dtypes.float8_e5m2))
E5M6 = Format("e5m6", 5, 6, 65024.0, True, None)

FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2, E5M6)}
"""What a recipe may name, once `dsv3/config/quant.py:FORMATS` has the name too."""

FLOAT32_SMALLEST_EXPONENT = -126

RUN = 128
"""Elements whose high halves are packed together: those of a tile."""


def format_of(name: str) -> Format:
    """The format called `name`. Raises `UserError` for an unknown one."""
    require(name in FORMATS, f"unknown number format {name!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def round_to(x: jax.Array, fmt: Format) -> jax.Array:
    """float32 array of the values of `fmt` nearest to float32 `x`."""
    x = x.astype(jnp.float32)
    inside = jnp.clip(x, -fmt.largest, fmt.largest)
    # Where numbers are normal, to so many bits of mantissa; below, to multiples of the smallest. With float32's own
    # exponents there is nothing below: devices flush what is subnormal there.
    rounded = jax.lax.reduce_precision(inside, exponent_bits=8, mantissa_bits=fmt.mantissa_bits)
    if fmt.smallest_exponent > FLOAT32_SMALLEST_EXPONENT:
        unit = 2.0 ** (fmt.smallest_exponent - fmt.mantissa_bits)
        subnormal = jnp.round(inside * (1 / unit)) * unit
        rounded = jnp.where(jnp.abs(inside) < 2.0 ** fmt.smallest_exponent, subnormal, rounded)
    return jnp.where(jnp.isfinite(x), rounded, x if fmt.infinities else jnp.nan)


def encode(x: jax.Array, fmt: Format) -> jax.Array:
    """`x` [..., n] in the storage of `fmt`: its dtype [..., n], or packed bytes [..., 3 ceil(n / 2)]."""
    rounded = round_to(x, fmt)
    if fmt.dtype is not None:
        return rounded.astype(fmt.dtype)
    half = jax.lax.bitcast_convert_type(rounded.astype(jnp.float16), jnp.uint16)
    return pack(jnp.where(jnp.isnan(rounded), jnp.uint16(0x7E0), half >> 4))


def decode(stored: jax.Array, fmt: Format, elements: int) -> jax.Array:
    """float32 [..., elements] of what `encode` stored."""
    if fmt.dtype is not None:
        return stored.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(unpack(stored, elements) << 4, jnp.float16).astype(jnp.float32)


def pack(codes: jax.Array) -> jax.Array:
    """12-bit codes, uint16 [..., n], as uint8 [..., 3 ceil(n / 2)]: the n low bytes, then the high halves of pairs.

    In a run of 128, element i < 64 shares a byte with element i + 64, which has its upper half; in a last, shorter run,
    i with i + half its length. So the elements of a byte are as far from each other as two registers of a thread that
    holds a matrix for the tensor core: a kernel packs without a word between threads. An odd n is padded by one.
    """
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    first, second = _paired(codes >> 8)
    return jnp.concatenate([codes & 0xFF, first | second << 4], axis=-1).astype(jnp.uint8)


def unpack(packed: jax.Array, elements: int) -> jax.Array:
    """The first `elements` codes of `pack`, uint16 [..., elements]."""
    low, high = jnp.split(packed.astype(jnp.uint16), [elements + elements % 2], axis=-1)
    return (low | _joined(high & 0xF, high >> 4) << 8)[..., :elements]


def _paired(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., n], n even, as the first and the second of every pair, [..., n / 2] each."""
    *lead, n = x.shape
    whole = n - n % RUN
    runs = x[..., :whole].reshape(*lead, whole // RUN, 2, RUN // 2)
    rest = x[..., whole:].reshape(*lead, 2, (n - whole) // 2)
    return tuple(jnp.concatenate([runs[..., half, :].reshape(*lead, whole // 2), rest[..., half, :]], axis=-1)
                 for half in range(2))


def _joined(first: jax.Array, second: jax.Array) -> jax.Array:
    """The inverse of `_paired`."""
    *lead, n = first.shape
    whole = n - n % (RUN // 2)
    runs = [x[..., :whole].reshape(*lead, 2 * whole // RUN, RUN // 2) for x in (first, second)]
    return jnp.concatenate([jnp.stack(runs, axis=-2).reshape(*lead, 2 * whole), first[..., whole:],
                            second[..., whole:]], axis=-1)
