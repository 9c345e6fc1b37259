"""Dense products of V3 with a scale for every tile: python -m experiments.benchmark gemm [--peers] [--only=TEXT]

`out[m, n] = a[m, k] b[n, k]^T` over the six products of a layer, forward, by rows (dgrad: n and k change places) and by
weights (wgrad: both operands 1 x 128 along tokens, float32 out); m = 4096 as in training, 64 and 128 as in decoding.
By weights stands beside two products of cuBLASLt: its own of the same operands, and the forward one of the same tokens
and matrix, which has as many operations.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dsv3.kernels import scaled_products_hopper
from dsv3.kernels.scaled import TILE, Blocks, Tiles, decode_blocks, decode_tiles, whole
from dsv3.quant import tiles as quant
from dsv3.quant.formats import E4M3
from experiments import benchmark_table, peers_torch
from experiments.benchmark_table import FP8_FLOPS, Case, Contestant, normal

SHAPES = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
"""(n, k) of q_a with kv_a, q_b, kv_b, o, gate_up and down of one expert."""
TOKENS, DECODED = 4096, (64, 128)


def to_tiles(x_MK: jax.Array) -> Tiles:
    """1 x 128 along the rows of x, padded to whole tiles."""
    m, k = x_MK.shape
    x = jnp.pad(x_MK, ((0, whole(m) - m), (0, whole(k) - k)))
    values, scales = quant.quantize(x, E4M3, quant.ALONG_ROWS, power_of_two=False)
    return Tiles(values, scales.T)


def to_blocks(w_NK: jax.Array) -> Blocks:
    """128 x 128 over the last two axes, padded to whole blocks."""
    n, k = w_NK.shape[-2:]
    w = jnp.pad(w_NK, [(0, 0)] * (w_NK.ndim - 2) + [(0, whole(n) - n), (0, whole(k) - k)])
    return Blocks(*quant.quantize(w, E4M3, quant.BLOCK, power_of_two=False))


def whole_fours(blocks: Blocks) -> Blocks:
    """Scales as cuBLASLt wants them: their rows filled to a multiple of four."""
    return blocks._replace(scales=jnp.pad(blocks.scales, ((0, 0), (0, -blocks.scales.shape[1] % 4))))


def decode(operand: Tiles | Blocks) -> jax.Array:
    """float32."""
    if isinstance(operand, Tiles):
        return decode_tiles(operand)
    *_, n, k = operand.values.shape
    rows = [(0, 0)] * (operand.values.ndim - 2) + [(0, whole(n) - n), (0, 0)]
    return decode_blocks(Blocks(jnp.pad(operand.values, rows), operand.scales[..., :k // TILE]))[..., :n, :]


def without_padding(operand: Tiles | Blocks, rows: int) -> Tiles | Blocks:
    """The first `rows`: what cuBLASLt needs no more than."""
    scales = operand.scales[:, :rows] if isinstance(operand, Tiles) else operand.scales
    return type(operand)(operand.values[:rows], scales)


def cublas_contestant(second: Callable, prepare: Callable = lambda a, b: (a, b)) -> Contestant:
    """Of what `prepare` makes a [m, k] and b [n, k]; `second` is how b is quantised."""
    def quantised(*inputs):
        a, b = prepare(*inputs)
        quantised_b = whole_fours(to_blocks(b)) if second is to_blocks else second(b)
        return without_padding(to_tiles(a), len(a)), without_padding(quantised_b, len(b))

    return Contestant(
        peers_torch.scaled_dot, lambda a, b: decode(a) @ decode(b).T, quantised, library="torch")


def decoded_dot(a: Tiles, b: Tiles | Blocks, shape: tuple[int, int], out_dtype: jnp.dtype) -> jax.Array:
    """What stock XLA can do: decode both to bfloat16, one product."""
    a, b = (decode(operand)[:rows].astype(jnp.bfloat16) for operand, rows in zip((a, b), shape, strict=True))
    return jnp.dot(a, b.T, preferred_element_type=out_dtype)


def plain_dot(a: jax.Array, b: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """bfloat16 operands, as the bfloat16 model multiplies."""
    return jnp.dot(a, b.T, preferred_element_type=out_dtype)


def on_this_device(product: Callable) -> Callable:
    """A product of `scaled_products_hopper` with the tuning of the device that it runs on."""
    return lambda *arguments: product(*arguments, kind=jax.devices()[0].device_kind)


SCALED: dict[str, Callable] = {"Hopper": on_this_device(scaled_products_hopper.scaled_dot),
                               "decoded by XLA": decoded_dot}
"""`scaled_dot(a: Tiles [M, K], b: Blocks [N, K], (m, n), out_dtype)`; the first is what ratios compare with."""
SCALED_WEIGHTS: dict[str, Callable] = {
    "Hopper": on_this_device(scaled_products_hopper.scaled_weight_gradient),
    "decoded by XLA": lambda a, b: decoded_dot(a, b, (len(a.values), len(b.values)), jnp.float32)}
"""`scaled_weight_gradient(a: Tiles [D, T], b: Tiles [F, T])`, likewise."""


def cublas_forward(rows: Callable[..., tuple[jax.Array, jax.Array]]) -> dict[str, Contestant]:
    """What weight gradients are measured by: the forward product of [T, D] with a matrix [F, D], which `rows` gives."""
    return {"cuBLASLt, forward of that shape": cublas_contestant(to_blocks, rows)}


def contestants(m: int, n: int, by_weights: bool) -> dict[str, Contestant]:
    """Everybody, for one pass; by weights they are given a [D, T], b [F, T] and, for the forward product, w [F, D]."""
    out_dtype = jnp.float32 if by_weights else jnp.bfloat16
    second = to_tiles if by_weights else to_blocks
    operands = lambda a, b, *w: (a, b)
    prepare = lambda a, b, *w: (to_tiles(a), second(b))
    product = lambda a, b: decode(a) @ decode(b).T
    expected = product if by_weights else lambda a, b: product(a, b)[:m, :n]
    forms = SCALED_WEIGHTS if by_weights else {
        name: lambda a, b, f=f: f(a, b, (m, n), out_dtype) for name, f in SCALED.items()}
    rows = {name: Contestant(form, expected, prepare) for name, form in forms.items()}
    rows["bfloat16 by XLA"] = Contestant(
        lambda a, b: plain_dot(a, b, out_dtype), lambda a, b: a.astype(jnp.float32) @ b.astype(jnp.float32).T,
        operands)
    rows["cuBLASLt, block-scaled"] = cublas_contestant(second, operands)
    return rows | (cublas_forward(lambda a, b, w: (a.T, w)) if by_weights else {})


def case(group: str, m: int, n: int, k: int, *, by_weights: bool) -> Case:
    """out[m, n] over an inner dimension of k; random operands, and bytes of the quantised ones."""
    out_bytes = 4 if by_weights else 2
    scales = 4 * (whole(k) // TILE) * (m + (n if by_weights else whole(n) // TILE))
    shapes = ((m, k), (n, k), (n, m))[:3 if by_weights else 2]
    inputs = lambda seed: tuple(normal(3 * seed + index, *shape) for index, shape in enumerate(shapes))
    return Case(group, f"{m} x {n} x {k}", inputs, contestants(m, n, by_weights), 2 * m * n * k,
                m * k + n * k + scales + out_bytes * m * n, FP8_FLOPS)


def cases() -> list[Case]:
    forward = [case(f"forward, m = {m}", m, n, k, by_weights=False)
               for m in (TOKENS, *DECODED) for n, k in SHAPES]
    by_rows = [case("by rows", TOKENS, k, n, by_weights=False) for n, k in SHAPES]
    by_weights = [case("by weights", k, n, TOKENS, by_weights=True) for n, k in SHAPES]
    return forward + by_rows + by_weights


def main(overrides: Sequence[str]) -> None:
    benchmark_table.run("gemm", cases(), "tflops", overrides)
