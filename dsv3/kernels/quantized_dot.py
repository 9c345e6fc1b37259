"""The Linear of a recipe: three products of quantised operands, and quantised tensors as all that waits between them.

    forward   y  = x w         x as `fprop_x`, w as `fprop_w`
    dgrad     dx = dy w^T      dy as `dgrad_dy`, w as `dgrad_w`
    wgrad     dw = x^T dy      both along tokens, as `wgrad_x` (from what was kept) and `wgrad_dy`; float32

Master weights are float32, activations and their gradients have the dtype of the model (report section 3.3.1).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3.config import Operand, Rule, require
from dsv3.kernels.fp8_kernels import REFERENCE, Kernels
from dsv3.kernels.grouped_dot import block_experts, block_starts
from dsv3.kernels.scaled import TILE, Blocks, Tiles, pack_tiles, unpack_tiles
from dsv3.kernels.scaled_dot import Products


class Linear(NamedTuple):
    """One place of the model: its name, its rule, and the functions that carry it out."""

    site: str
    rule: Rule
    kernels: Kernels

    @property
    def products(self) -> Products:
        return self.kernels.products(self.rule.interval, self.rule.accumulator)


def named(waiting: Tiles, site: str) -> Tiles:
    """What waits for the backward pass, under the name by which a recomputation policy may keep it."""
    return checkpoint_name(waiting, f"{site}.input")


def wait(tiles: Tiles, operand: Operand, site: str) -> Tiles:
    """`tiles` as they wait for the backward pass."""
    return named(pack_tiles(tiles, operand), site)


def quantize_input(x_MK: jax.Array, linear: Linear) -> tuple[Tiles, Tiles]:
    """What the forward product reads, and what waits for the weight gradient."""
    rule, kernels = linear.rule, linear.kernels
    if rule.kept is None:
        rows, columns = kernels.quantize_both(x_MK, rule.fprop_x, rule.wgrad_x)
        return rows, wait(columns, rule.wgrad_x, linear.site)
    if rule.kept == rule.fprop_x:
        rows = kernels.quantize_rows(x_MK, rule.fprop_x)
        return rows, wait(rows, rule.kept, linear.site)
    rows, packed = kernels.quantize_and_pack(x_MK, rule.fprop_x, rule.kept)
    return rows, named(packed, linear.site)


def wgrad_input(waiting: Tiles, linear: Linear) -> Tiles:
    """The input of the forward product along tokens, from what waited."""
    rule = linear.rule
    if rule.kept is None:
        return unpack_tiles(waiting, rule.wgrad_x)
    return linear.kernels.requantize_columns(unpack_tiles(waiting, rule.kept), rule.wgrad_x)


def quantize_weights(w: jax.Array, linear: Linear) -> tuple[Blocks, Blocks]:
    """For forward and dgrad; the same values, transposed, where the rule has one operand for both."""
    rule, quantize = linear.rule, linear.kernels.quantize_weights
    forward, dgrad = quantize(w, rule.fprop_w)
    return forward, dgrad if rule.dgrad_w == rule.fprop_w else quantize(w, rule.dgrad_w)[1]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot(x_MK: jax.Array, w_KN: jax.Array, linear: Linear, dtypes: tuple[jnp.dtype, jnp.dtype]) -> jax.Array:
    """`dtypes` of x and of the result."""
    return _dot_forward(x_MK, w_KN, linear, dtypes)[0]


def _dot_forward(x_MK, w_KN, linear, dtypes):
    rows, waiting = quantize_input(x_MK, linear)
    forward_w, dgrad_w = quantize_weights(w_KN, linear)
    y_MN = linear.products.dot(rows, forward_w, (len(x_MK), w_KN.shape[1]), dtypes[1])
    return y_MN, (waiting, dgrad_w, Width(x_MK.shape[1]))


@jax.tree_util.register_static
class Width(int):
    """The size of an axis among residuals; padded arrays do not tell."""


def _dot_backward(linear, dtypes, residuals, d_y_MN):
    waiting, dgrad_w, n_in = residuals
    d_x_MK, d_y_columns = input_gradient(d_y_MN, dgrad_w, n_in, linear)
    d_w_KN = linear.products.weight_gradient(wgrad_input(waiting, linear), d_y_columns)
    return d_x_MK.astype(dtypes[0]), d_w_KN[:n_in, :d_y_MN.shape[1]]


_dot.defvjp(_dot_forward, _dot_backward)


def input_gradient(d_y_MN: jax.Array, dgrad_w: Blocks, k: int, linear: Linear) -> tuple[jax.Array, Tiles]:
    """d_x [M, K], and d_y along tokens for the weight gradient."""
    rows, columns = linear.kernels.quantize_both(d_y_MN, linear.rule.dgrad_dy, linear.rule.wgrad_dy)
    return linear.products.dot(rows, dgrad_w, (len(d_y_MN), k), d_y_MN.dtype), columns


def quantized_dot(
    x: jax.Array, w_KN: jax.Array, rule: Rule, *, kernels: Kernels = REFERENCE, site: str = "linear",
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """x [..., K] @ w by `rule`, rounded once to `dtype` (None: that of x); the gradient of `w_KN` is float32.

    Raises `UserError` for integers, for operands of different K, and for what is no rule.
    """
    _require_rule(rule)
    _require_product(x, w_KN)
    dtypes = x.dtype, jnp.dtype(dtype or x.dtype)
    y_MN = _dot(x.reshape(-1, x.shape[-1]), w_KN.astype(jnp.float32), Linear(site, rule, kernels), dtypes)
    return y_MN.reshape(*x.shape[:-1], w_KN.shape[1])


def _require_rule(rule: Rule) -> None:
    require(isinstance(rule, Rule), f"a product in 8 bits has a Rule, not {str(rule)[:40]!r}; take one of a recipe, "
            "such as resolve('fp8').default")


def _require_product(x: jax.Array, w: jax.Array) -> None:
    """Padding to whole tiles would make operands of nearly the same K agree."""
    require(jnp.issubdtype(x.dtype, jnp.floating), f"x is {x.dtype.name}; a product in 8 bits takes floating-point "
            "numbers, so cast it first")
    require(x.shape[-1] == w.shape[-2], f"x {x.shape} and w {w.shape} cannot be multiplied: the last axis of x is "
            f"{x.shape[-1]}, the inner axis of w is {w.shape[-2]}")


def fp8_dot_general(rule: Rule, *, kernels: Kernels = REFERENCE) -> Callable:
    """For flax: `nn.Dense(features, dot_general=fp8_dot_general(rule))`.

    The result contracts the last axis of an activation with the first of a matrix, and raises `UserError` for others.
    flax casts both to the module's dtype before they come here: with `dtype=jnp.bfloat16` float32 masters are rounded
    to bfloat16 before they are quantised, and their gradient after it was summed. `quantized_dot` does neither.
    """
    _require_rule(rule)

    def dot_general(x, w, dimension_numbers, precision=None, preferred_element_type=None, **unused):
        (contracted, batch), ranks = dimension_numbers, (x.ndim, w.ndim)
        contracted, batch = (tuple(map(tuple, axes)) for axes in (contracted, batch))
        require(contracted == ((x.ndim - 1,), (0,)) and batch == ((), ()) and w.ndim == 2,
                f"fp8_dot_general was asked for axes {contracted}, batches {batch} of arrays of {ranks} axes; it has "
                "products of the last axis of x with the first of a matrix only")
        return quantized_dot(x, w, rule, kernels=kernels, dtype=preferred_element_type)

    return dot_general


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_dot(rows_JK: jax.Array, sizes_E: jax.Array, w_EKN: jax.Array, linear: Linear) -> jax.Array:
    return _grouped_dot_forward(rows_JK, sizes_E, w_EKN, linear)[0]


def _grouped_dot_forward(rows_JK, sizes_E, w_EKN, linear):
    rows, waiting = quantize_input(rows_JK, linear)
    forward_w, dgrad_w = quantize_weights(w_EKN, linear)
    y_JN = linear.products.grouped_dot(rows, forward_w, experts_of(sizes_E, len(rows_JK)), rows_JK.dtype)
    return y_JN[:, :w_EKN.shape[2]], (waiting, sizes_E, dgrad_w, Width(rows_JK.shape[1]))


def _grouped_dot_backward(linear, residuals, d_y_JN):
    waiting, sizes_E, dgrad_w, n_in = residuals
    rule = linear.rule
    rows, columns = linear.kernels.quantize_both(d_y_JN, rule.dgrad_dy, rule.wgrad_dy)
    d_rows_JK = linear.products.grouped_dot(rows, dgrad_w, experts_of(sizes_E, len(d_y_JN)), d_y_JN.dtype)
    d_w_EKN = linear.products.grouped_weight_gradient(wgrad_input(waiting, linear), columns, *expert_rows(sizes_E))
    return d_rows_JK[:, :n_in], None, d_w_EKN[:, :n_in, :d_y_JN.shape[1]]


_grouped_dot.defvjp(_grouped_dot_forward, _grouped_dot_backward)


def experts_of(sizes_E: jax.Array, n_rows: int) -> jax.Array:
    """The expert of every block of 128 of the J rows."""
    return block_experts(sizes_E, n_rows // TILE, TILE)


def expert_rows(sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First row of every expert, and its blocks of 128 rows."""
    return block_starts(sizes_E, TILE), -(-sizes_E // TILE)


def fp8_grouped_dot(
    rows_JK: jax.Array, sizes_E: jax.Array, w_EKN: jax.Array, rule: Rule, *, kernels: Kernels = REFERENCE,
) -> jax.Array:
    """`grouped_dot` by `rule`, with rows in blocks of 128: one expert's product by itself, for comparison and study.

    The model's `moe` quantises tokens before they become rows, and keeps less. Raises `UserError` for other row counts,
    for integers, and where the sizes of rows, experts and weights do not agree.
    """
    _require_rule(rule)
    _require_product(rows_JK, w_EKN)
    require(sizes_E.shape == (len(w_EKN),), f"sizes have shape {sizes_E.shape}, and w_EKN has {len(w_EKN)} experts; "
            "give one size for each")
    require(len(rows_JK) % TILE == 0, f"{len(rows_JK)} rows are not whole blocks of {TILE}; pad every expert's rows")
    return _grouped_dot(rows_JK, sizes_E, w_EKN.astype(jnp.float32), Linear("experts", rule, kernels))
