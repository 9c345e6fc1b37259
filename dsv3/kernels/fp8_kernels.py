"""The bundle of functions that training in 8 bits is made of: one frozen tuple for every way to run them."""

from collections.abc import Callable
from typing import NamedTuple

from dsv3.kernels import permute, quantize, scaled_dot, swiglu_quantize
from dsv3.kernels.attention import ATTENTION, Attention
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.scaled_dot import Products


class Kernels(NamedTuple):
    """Signatures are those of the reference forms, which `REFERENCE` holds.

    Quantised operands agree to the bit, but for those of a norm or SwiGLU, whose own sums and exponentials round
    otherwise: some of their codes are neighbours.
    `products(interval, accumulator)` gives the four products of a rule, or refuses what the device cannot do.
    """

    quantize_rows: Callable
    quantize_columns: Callable
    quantize_both: Callable
    requantize_columns: Callable
    quantize_and_pack: Callable
    unpack_both: Callable
    quantize_weights: Callable
    norm: Callable
    norm_quantize: Callable
    swiglu_quantize: Callable
    swiglu_backward_quantize: Callable
    permute_tiles: Callable
    combine_rows: Callable
    products: Callable[[int, str], Products]
    attention: Attention


REFERENCE = Kernels(
    quantize_rows=quantize.quantize_rows,
    quantize_columns=quantize.quantize_columns,
    quantize_both=quantize.quantize_both,
    requantize_columns=quantize.requantize_columns,
    quantize_and_pack=quantize.quantize_and_pack,
    unpack_both=quantize.unpack_both,
    quantize_weights=quantize.quantize_weights,
    norm=rms_norm,
    norm_quantize=quantize.norm_quantize,
    swiglu_quantize=swiglu_quantize.swiglu_quantize,
    swiglu_backward_quantize=swiglu_quantize.swiglu_backward_quantize,
    permute_tiles=permute.permute_tiles,
    combine_rows=permute.combine_rows,
    products=scaled_dot.products,
    attention=ATTENTION,
)
"""Plain jnp, on any device."""
