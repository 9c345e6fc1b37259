"""Grouped matrix product: every row times the matrix of its own expert.

Rows arrive in expert order, each expert's rows padded to whole blocks, so a block of rows belongs to one expert. This
is the layout that a GPU kernel wants; `jax.lax.ragged_dot` would multiply every row by every expert.
"""

from functools import partial

import jax
import jax.numpy as jnp


def padded_rows(n_rows: int, n_experts: int, block: int) -> int:
    """The most rows that `n_rows` rows can take once every expert is padded to blocks: J, a multiple of `block`."""
    return (n_rows + min(n_rows, n_experts) * (block - 1)) // block * block


def block_starts(sizes_E: jax.Array, block: int) -> jax.Array:
    """First row of each expert, [E]: the running sum of sizes rounded up to blocks."""
    padded = (sizes_E + block - 1) // block * block
    return jnp.cumsum(padded) - padded


def block_experts(sizes_E: jax.Array, n_blocks: int, block: int) -> jax.Array:
    """The expert of every block, [n_blocks]; blocks after the last expert's have the number E, of none."""
    ends = jnp.cumsum((sizes_E + block - 1) // block)
    return jnp.searchsorted(ends, jnp.arange(n_blocks), side="right", method="compare_all").astype(jnp.int32)


def of_experts(w: jax.Array, expert_Z: jax.Array) -> jax.Array:
    """w [E, ...] of every block's expert, [Z, ...]; zeros where there is none."""
    return w.at[expert_Z].get(mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot(rows_JD: jax.Array, sizes_E: jax.Array, w_EDF: jax.Array, block: int) -> jax.Array:
    """rows @ w[expert of the row], as one batched product over row blocks. Padding rows must be zero.

    Blocks after the last expert's give zeros, gradients too. `sizes_E` counts the real rows of each expert; expert e
    starts at `block_starts(sizes_E)[e]`. The float32 masters `w_EDF` are cast to the dtype of the rows; their gradient
    is accumulated in float32 (report section 3.3.1). Gathers one matrix per block, so it moves J / block matrices; on
    two CPU cores this beats a scan over blocks by 1.5.
    """
    blocks, experts = _blocks(rows_JD, sizes_E, block)
    out = jnp.einsum("zbd,zdf->zbf", blocks, of_experts(w_EDF.astype(rows_JD.dtype), experts))
    return out.reshape(rows_JD.shape[0], w_EDF.shape[2])


def _blocks(rows: jax.Array, sizes_E: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    n_blocks = rows.shape[0] // block
    return rows.reshape(n_blocks, block, rows.shape[1]), block_experts(sizes_E, n_blocks, block)


def _grouped_dot_forward(rows_JD, sizes_E, w_EDF, block):
    return grouped_dot(rows_JD, sizes_E, w_EDF, block), (rows_JD, sizes_E, w_EDF)


def _grouped_dot_backward(block, residuals, d_out_JF):
    rows_JD, sizes_E, w_EDF = residuals
    blocks, experts = _blocks(rows_JD, sizes_E, block)
    d_blocks, _ = _blocks(d_out_JF, sizes_E, block)
    d_rows = jnp.einsum("zbf,zdf->zbd", d_blocks, of_experts(w_EDF.astype(rows_JD.dtype), experts))
    d_w_ZDF = jnp.einsum("zbd,zbf->zdf", blocks, d_blocks, preferred_element_type=jnp.float32)
    d_w_EDF = jnp.zeros(w_EDF.shape, jnp.float32).at[experts].add(d_w_ZDF, indices_are_sorted=True)
    return d_rows.reshape(rows_JD.shape), None, d_w_EDF.astype(w_EDF.dtype)


grouped_dot.defvjp(_grouped_dot_forward, _grouped_dot_backward)


def grouped_dot_loop(rows_JD: jax.Array, sizes_E: jax.Array, w_EDF: jax.Array, block: int) -> jax.Array:
    """The obvious form of `grouped_dot`: every expert multiplies all rows, and keeps its own."""
    n_rows = rows_JD.shape[0]
    expert_J = jnp.repeat(block_experts(sizes_E, n_rows // block, block), block, total_repeat_length=n_rows)
    out_JF = jnp.zeros((n_rows, w_EDF.shape[2]), rows_JD.dtype)
    for expert in range(w_EDF.shape[0]):
        out_JF = jnp.where((expert_J == expert)[:, None], rows_JD @ w_EDF[expert], out_JF)
    return out_JF
