"""Products of rows with the matrix of their own expert: python -m experiments.benchmark grouped [--peers] [--only=TEXT]

Forward, by rows and by weights (float32 out), at V3's experts in 4 to 256 groups and at small_moe's; even, skewed and
with empty groups. Operations count real rows; the kernels also pass over what pads every group to blocks of 128 (blocks
after the last group's are only written, zeros). cuBLASLt multiplies as many rows with one matrix of the same sizes, by
weights too.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.kernels import scaled_products_hopper
from dsv3.kernels.grouped_dot import block_experts, block_starts, grouped_dot, padded_rows
from dsv3.kernels.grouped_dot_hopper import BLOCK, STEP, grouped_dot_hopper, rows_times_experts, weight_gradient
from dsv3.kernels.scaled import TILE
from experiments import benchmark_table, peers_torch
from experiments.benchmark_gemm import cublas_contestant, cublas_forward, decode, on_this_device, to_blocks, to_tiles
from experiments.benchmark_table import BF16_FLOPS, FP8_FLOPS, Case, Contestant, normal

GATE_UP, DOWN = (7168, 4096), (2048, 7168)
EXPERTS = {
    "4 x 8192, gate_up": (4, 32_768, *GATE_UP), "4 x 8192, down": (4, 32_768, *DOWN),
    "8 x 4096, gate_up": (8, 32_768, *GATE_UP), "8 x 4096, down": (8, 32_768, *DOWN),
    "32 x 256, gate_up": (32, 8_192, *GATE_UP), "32 x 256, down": (32, 8_192, *DOWN),
    "256 x 128, 2048 x 1024": (256, 32_768, 2048, 1024), "small_moe gate_up": (64, 262_144, 1280, 1024),
}
"""(experts, rows in all, in, out)."""
UNEVEN = ("4 x 8192, gate_up", "8 x 4096, gate_up", "32 x 256, gate_up", "256 x 128, 2048 x 1024")
"""Those that are skewed and have empty groups too."""
SKEW = 0.3
"""Shares of skewed groups run from 1 - SKEW to 1 + SKEW of the mean."""


def group_sizes(load: str, n_experts: int, n_rows: int) -> np.ndarray:
    """Real rows of every expert, int32 [E], `n_rows` in all: `even`, `skewed`, or every third group `empty`."""
    shares = {"even": np.ones(n_experts), "skewed": np.random.default_rng(0).permutation(
        np.linspace(1 - SKEW, 1 + SKEW, n_experts)), "empty": np.arange(n_experts) % 3 != 1}[load]
    ends = np.round(np.cumsum(shares) / np.sum(shares) * n_rows).astype(np.int32)
    return np.diff(ends, prepend=0).astype(np.int32)


def real_rows(rows_JD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Zero in the rows of padding."""
    starts = block_starts(sizes_E, BLOCK)
    row_J1 = jnp.arange(len(rows_JD))[:, None]
    real_J = jnp.any((row_J1 >= starts[None]) & (row_J1 < (starts + sizes_E)[None]), axis=1)
    return jnp.where(real_J[:, None], rows_JD, 0)


def _float32(function: Callable) -> Callable:
    """`function` of arrays in float32."""
    wide = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    return lambda *inputs: function(*(wide(x) for x in inputs))


def ends(sizes_E: jax.Array) -> jax.Array:
    """Where torch's groups end: every group with its padding, int32 [E]."""
    return (block_starts(sizes_E, BLOCK) + -(-sizes_E // BLOCK) * BLOCK).astype(jnp.int32)


def block_owners(ends_E: jax.Array, n_rows: int) -> jax.Array:
    """Whose every block of rows is, [Z]: the first group that ends after it starts; the last's after all."""
    owner_Z = jnp.searchsorted(ends_E, BLOCK * jnp.arange(n_rows // BLOCK), side="right")
    return jnp.minimum(owner_Z, len(ends_E) - 1)


def in_blocks(rows_JD: jax.Array) -> jax.Array:
    """[Z, BLOCK, D]; a block holds rows of one group."""
    return rows_JD.reshape(-1, BLOCK, rows_JD.shape[1])


def by_ends(rows_JD: jax.Array, w_EDF: jax.Array, ends_E: jax.Array) -> jax.Array:
    """The reference: block after block times the matrix of its owner."""
    blocks = in_blocks(rows_JD), block_owners(ends_E, len(rows_JD))
    out_ZBF = jax.lax.map(lambda block: block[0] @ w_EDF[block[1]], blocks)
    return out_ZBF.reshape(len(rows_JD), w_EDF.shape[2])


def by_groups(rows_JD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`by_ends` of groups of these sizes with their padding."""
    return by_ends(rows_JD, w_EDF, ends(sizes_E))


def weights_by_groups(rows_JD: jax.Array, d_out_JF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The reference of the weight gradient: every block's product, added to its owner's. Padding is zeros."""
    def add(d_w_EDF, block):
        rows_BD, d_out_BF, expert = block
        return d_w_EDF.at[expert].add(rows_BD.T @ d_out_BF), None

    blocks = in_blocks(rows_JD), in_blocks(d_out_JF), block_owners(ends(sizes_E), len(rows_JD))
    d_w_EDF = jnp.zeros((len(sizes_E), rows_JD.shape[1], d_out_JF.shape[1]), rows_JD.dtype)
    return jax.lax.scan(add, d_w_EDF, blocks)[0]


def forward_bf16(rows_JD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, transpose: bool) -> jax.Array:
    expert_Z = block_experts(sizes_E, len(rows_JD) // BLOCK, BLOCK)
    return rows_times_experts(rows_JD, expert_Z, w_EDF, transpose=transpose)


def weights_bf16(rows_JD: jax.Array, d_out_JF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return weight_gradient(rows_JD, block_starts(sizes_E, BLOCK), -(-sizes_E // STEP), d_out_JF)


SCALED: dict[str, Callable] = {"Hopper": on_this_device(scaled_products_hopper.scaled_grouped_dot)}
"""`scaled_grouped_dot(a: Tiles [J, K], b: Blocks [E, N, K], expert_Z, out_dtype)`; the fastest first."""
SCALED_WEIGHTS: dict[str, Callable] = {
    "Hopper": on_this_device(scaled_products_hopper.scaled_grouped_weight_gradient)}
"""`scaled_grouped_weight_gradient(a: Tiles [D, J], b: Tiles [F, J], start_E, steps_E)`, likewise."""


def scaled_contestants(transpose: bool) -> dict[str, Contestant]:
    """`SCALED`, on quantised rows and matrices whose inner dimension is last."""
    def prepare(rows_JD, w_EDF, sizes_E):
        w_ENK = w_EDF if transpose else w_EDF.swapaxes(1, 2)
        expert_Z = block_experts(sizes_E, len(rows_JD) // BLOCK, BLOCK)
        return to_tiles(rows_JD), to_blocks(w_ENK), expert_Z, sizes_E

    def expected(a, b, expert_Z, sizes_E):
        del expert_Z
        return by_groups(decode(a), decode(b).swapaxes(1, 2), sizes_E)

    return {name: Contestant(lambda a, b, expert_Z, sizes_E, f=f: f(a, b, expert_Z, jnp.bfloat16), expected, prepare)
            for name, f in SCALED.items()}


def weight_contestants(n_real: int) -> dict[str, Contestant]:
    """By weights: `SCALED_WEIGHTS` on both operands in tiles along the rows, and the others.

    All are given rows [J, D], d_out [J, F], sizes and, for cuBLASLt's forward product of `n_real` rows, w [F, D].
    """
    def prepare(rows_JD, d_out_JF, sizes_E, w_FD):
        del w_FD
        return to_tiles(rows_JD.T), to_tiles(d_out_JF.T), sizes_E

    run = lambda a, b, sizes_E, f: f(a, b, block_starts(sizes_E, BLOCK), -(-sizes_E // BLOCK))
    expected = lambda a, b, sizes_E: weights_by_groups(decode(a).T, decode(b).T, sizes_E)
    ours = {name: Contestant(partial(run, f=f), expected, prepare) for name, f in SCALED_WEIGHTS.items()}
    plain = Contestant(weights_bf16, _float32(weights_by_groups), lambda rows, d_out, sizes, w: (rows, d_out, sizes))
    return ours | {"bfloat16": plain} | cublas_forward(lambda rows, d_out, sizes, w: (rows[:n_real], w))


def contestants(transpose: bool, n_real: int, n_padded: int) -> dict[str, Contestant]:
    """Forward, or by rows with `transpose`; the fastest first. torch gets the rows up to the end of the last group.

    cuBLASLt multiplies `n_real` rows with one matrix: the same n and k without groups.
    """
    turned = lambda w_EDF: w_EDF.swapaxes(1, 2) if transpose else w_EDF
    expected = _float32(lambda rows, w, sizes: by_groups(rows, turned(w), sizes))
    return scaled_contestants(transpose) | {
        "bfloat16": Contestant(lambda *inputs: forward_bf16(*inputs, transpose=transpose), expected),
        "torch grouped_mm, bfloat16": Contestant(
            peers_torch.grouped_dot, _float32(by_ends),
            lambda rows, w, sizes: (rows[:n_padded], turned(w), ends(sizes)), library="torch"),
        "cuBLASLt, block-scaled, dense": cublas_contestant(
            to_blocks, lambda rows, w, sizes: (rows[:n_real], w[0] if transpose else w[0].T)),
    }


def cases_of(name: str, load: str, n_experts: int, n_rows: int, n_in: int, n_out: int) -> list[Case]:
    """Forward, by rows and by weights of one shape.

    Bytes are of 8-bit operands with their scales: matrices without rows are not read, but all gradients are written.
    """
    sizes_E = jnp.asarray(group_sizes(load, n_experts, n_rows))
    padded, n_padded = padded_rows(n_rows, n_experts, BLOCK), int(ends(sizes_E)[-1])
    rows = lambda seed, width: real_rows(normal(seed, padded, width), sizes_E)
    weights = lambda seed: normal(seed, n_experts, n_in, n_out)
    flops = 2 * n_rows * n_in * n_out
    even = lambda way: None if load == "even" else f"{way}, even"
    scaled = lambda elements, tile: elements + 4 * elements // tile
    read = scaled(int((sizes_E > 0).sum()) * n_in * n_out, TILE ** 2)
    tiles = n_padded // TILE * (n_in + n_out)  # along the rows: one scale for every block that holds some
    return [
        Case(f"forward, {load}", name, lambda seed: (rows(2 * seed, n_in), weights(2 * seed + 1), sizes_E),
             contestants(False, n_rows, n_padded), flops,
             scaled(n_rows * n_in, TILE) + read + 2 * n_rows * n_out, FP8_FLOPS, even("forward"), n_padded),
        Case(f"by rows, {load}", name, lambda seed: (rows(2 * seed, n_out), weights(2 * seed + 1), sizes_E),
             contestants(True, n_rows, n_padded), flops,
             scaled(n_rows * n_out, TILE) + read + 2 * n_rows * n_in, FP8_FLOPS, even("by rows"), n_padded),
        Case(f"by weights, {load}", name, lambda seed: (
                 rows(3 * seed, n_in), rows(3 * seed + 1, n_out), sizes_E, normal(3 * seed + 2, n_out, n_in)),
             weight_contestants(n_rows), flops,
             n_rows * (n_in + n_out) + 4 * tiles + 4 * n_experts * n_in * n_out, FP8_FLOPS,
             even("by weights"), n_padded),
    ]


def gradients_case() -> Case:
    """Value and both gradients of the differentiable form against the reference: skewed groups, two of them empty."""
    sizes_E, (n_in, n_out) = jnp.array([130, 0, 5, 128, 700, 1, 64, 0], jnp.int32), (256, 384)
    n_rows = padded_rows(int(sizes_E.sum()), len(sizes_E), BLOCK)

    def inputs(seed):
        return (real_rows(normal(seed, n_rows, n_in), sizes_E), normal(seed, len(sizes_E), n_in, n_out,
                dtype=jnp.float32), normal(seed + 1, n_rows, n_out))

    def of(product, rows, w, d_out):
        out, vjp = jax.vjp(lambda rows, w: product(rows, sizes_E, w, BLOCK), rows, w)
        return out, *vjp(d_out)

    contestant = Contestant(lambda *a: of(grouped_dot_hopper, *a), lambda *a: of(grouped_dot, *a))
    flops = 6 * int(sizes_E.sum()) * n_in * n_out
    return Case("check", "values and gradients, empty groups", inputs, {"bfloat16": contestant}, flops, 0, BF16_FLOPS)


def cases() -> list[Case]:
    even = [case for name, shape in EXPERTS.items() for case in cases_of(name, "even", *shape)]
    other = [case for load in ("skewed", "empty") for name in UNEVEN for case in cases_of(name, load, *EXPERTS[name])]
    return [gradients_case(), *even, *other]


def main(overrides: Sequence[str]) -> None:
    benchmark_table.run("grouped", cases(), "tflops", overrides)
