"""SwiGLU with quantised results, in plain jnp: its input waits in 8 bits, its output is made again (section 3.3.3)."""

import jax
import jax.numpy as jnp

from dsv3.config import Operand
from dsv3.kernels.quantize import quantize_columns, quantize_rows
from dsv3.kernels.scaled import Tiles, decode_tiles
from dsv3.kernels.swiglu import swiglu


def swiglu_quantize(gate_up_MF: jax.Array, rows: Operand, kept: Operand | None) -> tuple[Tiles, Tiles | jax.Array]:
    """h = `swiglu(gate_up)` in tiles along its features, [M', F' / 2], and gate_up as it will wait, [M', F'].

    `kept` None: gate_up itself.
    """
    waiting = gate_up_MF if kept is None else quantize_rows(gate_up_MF, kept)
    return quantize_rows(swiglu(gate_up_MF), rows), waiting


def swiglu_backward_quantize(
    kept: Tiles | jax.Array, d_h_MF: jax.Array, weight_M: jax.Array | None, rows: Operand, columns: Operand,
    h_columns: Operand,
) -> tuple[Tiles, Tiles, Tiles, jax.Array | None]:
    """Gradient of gate_up, both ways, and h once more for the weight gradient of the product after it.

    `kept` is gate_up; `d_h_MF` [M, F / 2] is the gradient of h, without the gate weights `weight_M` of experts' rows.
    In float32, rounded to the dtype of `d_h_MF` before it is quantised, as other gradients are; the gradient of gate_up
    is that of weight * h, and so is what stands for h. Returns d_gate_up [M', F'], its transpose [F', M'],
    (weight * h) transposed [F' / 2, M'], and
    d_weight[m] = sum over features of h * d_h, or None without weights.
    """
    m, f = d_h_MF.shape
    gate_up = decode_tiles(kept)[:m, :2 * f] if isinstance(kept, Tiles) else kept.astype(jnp.float32)
    gate, up = gate_up[:, :f], gate_up[:, f:]
    d_h, sigmoid = d_h_MF.astype(jnp.float32), jax.nn.sigmoid(gate)
    silu, d_weight_M = gate * sigmoid, None
    h = silu * up
    if weight_M is not None:
        d_weight_M = jnp.sum(h * d_h, axis=1)
        d_h, h = d_h * weight_M[:, None], h * weight_M[:, None]
    d_gate = d_h * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_gate_up = jnp.concatenate([d_gate, d_h * silu], axis=1).astype(d_h_MF.dtype)
    h = h.astype(d_h_MF.dtype)
    return (quantize_rows(d_gate_up, rows), quantize_columns(d_gate_up, columns), quantize_columns(h, h_columns),
            d_weight_M)
