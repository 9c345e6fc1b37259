"""Every Hopper kernel against its reference on random data, and its speed at the shapes of small_moe and of V3."""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import require
from dsv3.kernels.attention import causal_attention
from dsv3.kernels.attention_cudnn import causal_attention_cudnn
from dsv3.kernels.grouped_dot import block_experts, block_starts, grouped_dot, padded_rows
from dsv3.kernels.grouped_dot_hopper import BLOCK, STEP, grouped_dot_hopper, rows_times_experts, weight_gradient
from dsv3.kernels.permute import make_plan, permute, unpermute
from dsv3.parallel.ops import is_hopper
from experiments.benchmark_record import write_json

BOUND = 0.01
"""Largest accepted norm-wise distance of two bfloat16 results; rounding alone gives 0.002 to 0.005."""
EXPERTS = {
    "small_moe gate_up": (64, 262_144, 1280, 1024), "small_moe down": (64, 262_144, 512, 1280),
    "V3 gate_up, 8 experts": (8, 32_768, 7168, 4096), "V3 down, 8 experts": (8, 32_768, 2048, 7168),
}
"""(experts, rows in all, in, out)."""
ATTENTION = {"small_moe": (16, 2048, 8), "V3": (1, 4096, 128)}
"""(rows, tokens, heads)."""


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def distance(actual: jax.Array, expected: jax.Array) -> float:
    """||actual - expected|| / ||expected||, NaN where either has one."""
    actual, expected = (np.asarray(array, np.float64) for array in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def seconds(function: Callable, *arguments, repeats: int = 10) -> float:
    """Median over five batches of `repeats` calls, compiled and warmed up."""
    function = jax.jit(function)
    jax.block_until_ready([function(*arguments) for _ in range(2)])
    times = []
    for _ in range(5):
        start = time.perf_counter()
        results = [function(*arguments) for _ in range(repeats)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / repeats)
        del results
    return sorted(times)[2]


def gradients(function: Callable, cotangent: jax.Array, *arguments) -> tuple[jax.Array, ...]:
    """The value of `function` and its gradient with respect to every argument."""
    out, vjp = jax.vjp(function, *arguments)
    return out, *vjp(cotangent)


def largest_distance(fast: Callable, reference: Callable, cotangent: jax.Array, *arguments) -> float:
    """Over the value and all gradients of two functions."""
    pairs = zip(*(jax.jit(lambda *a, f=f: gradients(f, cotangent, *a))(*arguments) for f in (fast, reference)),
                strict=True)
    return float(np.max([distance(*pair) for pair in pairs]))


def attention_inputs(rows: int, tokens: int, heads: int) -> tuple[list[jax.Array], jax.Array]:
    head = lambda seed, width: normal(seed, rows, tokens, heads, width)
    return [head(0, 128), head(1, 64), head(2, 128), normal(3, rows, tokens, 64), head(4, 128)], head(5, 128)


def check_attention(segments: bool) -> float:
    inputs, cotangent = attention_inputs(2, 512, 8)
    ids_BT = jnp.cumsum(jax.random.bernoulli(jax.random.key(9), 0.01, (2, 512)), axis=1, dtype=jnp.int32) + 1
    fast, reference = (
        lambda *a, f=f: f(*a, scale=192 ** -0.5, segment_ids_BT=ids_BT if segments else None)
        for f in (causal_attention_cudnn, causal_attention))
    return largest_distance(fast, reference, cotangent, *inputs)


def check_experts() -> float:
    """Skewed groups, two of them empty."""
    sizes_E, (n_in, n_out) = jnp.array([130, 0, 5, 128, 700, 1, 64, 0], jnp.int32), (256, 384)
    n_rows = padded_rows(int(sizes_E.sum()), len(sizes_E), BLOCK)
    w_EDF = normal(1, len(sizes_E), n_in, n_out, dtype=jnp.float32)
    fast, reference = (lambda rows, w, f=f: f(rows, sizes_E, w, BLOCK) for f in (grouped_dot_hopper, grouped_dot))
    rows_JD = real_rows(normal(0, n_rows, n_in), sizes_E)
    return largest_distance(fast, reference, normal(2, n_rows, n_out), rows_JD, w_EDF)


def real_rows(rows_JD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Zero in the rows of padding."""
    starts = block_starts(sizes_E, BLOCK)
    row_J1 = jnp.arange(len(rows_JD))[:, None]
    real_J = jnp.any((row_J1 >= starts[None]) & (row_J1 < (starts + sizes_E)[None]), axis=1)
    return jnp.where(real_J[:, None], rows_JD, 0)


def time_experts(n_experts: int, n_rows: int, n_in: int, n_out: int) -> dict[str, float]:
    """TFLOP/s of the product and both gradients, counting real rows; loads as of a uniform random router."""
    sizes_E = jnp.array(np.random.default_rng(0).multinomial(n_rows, np.full(n_experts, 1 / n_experts)), jnp.int32)
    padded = padded_rows(n_rows, n_experts, BLOCK)
    rows_JD = real_rows(normal(0, padded, n_in), sizes_E)
    w, d_out_JF = normal(1, n_experts, n_in, n_out), normal(2, padded, n_out)
    expert_Z = block_experts(sizes_E, padded // BLOCK, BLOCK)
    starts_E, steps_E = block_starts(sizes_E, BLOCK), -(-sizes_E // STEP)
    times = {
        "forward": seconds(lambda x, w: rows_times_experts(x, expert_Z, w, transpose=False), rows_JD, w),
        "by rows": seconds(lambda g, w: rows_times_experts(g, expert_Z, w, transpose=True), d_out_JF, w),
        "by weights": seconds(lambda x, g: weight_gradient(x, starts_E, steps_E, g), rows_JD, d_out_JF),
    }
    return {f"{name} TFLOP/s": 2e-12 * n_rows * n_in * n_out / time for name, time in times.items()}


def time_attention(rows: int, tokens: int, heads: int) -> dict[str, float]:
    """TFLOP/s over the causal half of the square, backward counted as twice the forward."""
    inputs, cotangent = attention_inputs(rows, tokens, heads)
    attend = lambda *a: causal_attention_cudnn(*a, scale=192 ** -0.5, segment_ids_BT=None)
    tera = 1e-12 * rows * heads * tokens ** 2 * (192 + 128)
    both = seconds(lambda *a: gradients(attend, cotangent, *a), *inputs)
    return {"forward TFLOP/s": tera / seconds(attend, *inputs), "forward and backward TFLOP/s": 3 * tera / both}


def time_dispatch(n_tokens: int, width: int) -> dict[str, float]:
    """GB/s of rows written (dispatch) and read (combine), for top 8 of 64."""
    topk_TK = jax.lax.top_k(jax.random.uniform(jax.random.key(0), (n_tokens, 64)), 8)[1]
    plan, _ = jax.jit(lambda topk: make_plan(topk, 64, BLOCK))(topk_TK)
    x_TD = normal(1, n_tokens, width)
    rows_JD = jax.jit(permute)(x_TD, plan)
    giga = 1e-9 * rows_JD.nbytes
    weights_TK = jnp.full((n_tokens, 8), 0.125)
    return {"dispatch GB/s": giga / seconds(permute, x_TD, plan),
            "combine GB/s": giga / seconds(unpermute, rows_JD, plan, weights_TK)}


def ceilings() -> dict[str, float]:
    """What a large copy (bytes read and written) and a large bfloat16 product reach on this device."""
    a, big = normal(0, 8192, 8192), normal(1, 2 ** 14, 2 ** 14, dtype=jnp.float32)
    return {"copy GB/s": 2e-9 * big.nbytes / seconds(lambda x: x + 1, big),
            "8192^3 product TFLOP/s": 2e-12 * 8192 ** 3 / seconds(lambda a: a @ a, a)}


def main(overrides: Sequence[str]) -> None:
    require(not overrides, "`benchmark kernels` has fixed shapes; --config fields belong to `benchmark step`")
    device = jax.devices()[0]
    require(is_hopper(device), f"`benchmark kernels` needs a Hopper GPU; the default device is {device.device_kind}")
    print(f"{device.device_kind}, jax {version('jax')}\n")
    checks = {"attention": check_attention(False), "attention, segments": check_attention(True),
              "grouped products": check_experts()}
    for name, error in checks.items():
        print(f"{name}: largest distance to the reference {error:.2g}", flush=True)
    figures = {"checks": checks, "ceilings": ceilings()}
    figures |= {f"grouped products, {name}": time_experts(*shape) for name, shape in EXPERTS.items()}
    figures |= {f"attention, {name}": time_attention(*shape) for name, shape in ATTENTION.items()}
    figures["dispatch and combine, small_moe"] = time_dispatch(32_768, 1280)
    for name, values in list(figures.items())[1:]:
        print(f"{name}: " + ", ".join(f"{what} {value:.0f}" for what, value in values.items()))
    write_json(figures)
    wrong = [name for name, error in checks.items() if not error < BOUND]
    require(not wrong, f"{', '.join(wrong)}: further than {BOUND} from the reference")
