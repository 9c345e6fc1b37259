"""Every memory-bound Hopper kernel against its reference, to the bit, and its speed as a share of a measured copy."""

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config.quant import Operand
from dsv3.kernels import (
    norm_quantize_hopper,
    permute_hopper,
    quantize_hopper,
    swiglu_quantize_hopper,
    weights_quantize_hopper,
)
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.scaled import Blocks, Tiles
from dsv3.kernels.stream_hopper import Streaming
from dsv3.kernels.swiglu import swiglu
from dsv3.quant.formats import format_of, round_to
from dsv3.quant.tiles import scale_of

E4M3 = Operand(format="e4m3", tile="inner", power_of_two=False)
E4M3_POWER = Operand(format="e4m3", tile="inner", power_of_two=True)
E5M2_POWER = Operand(format="e5m2", tile="inner", power_of_two=True)
E5M6_POWER = Operand(format="e5m6", tile="inner", power_of_two=True)
BLOCK = Operand(format="e4m3", tile="block", power_of_two=False)
E4M3_FORMAT = format_of("e4m3")
MEMORY = 10e9
"""Bytes that the inputs and outputs of one timing program may take, about."""
REPEATS, FEW = 100, 10
"""Runs whose results must be equal to the bit, as a race shows as a difference: of the first setting, of the others."""


class Case(NamedTuple):
    """A kernel with its settings, the same in jnp, its inputs at a shape, and the bytes it must move there.

    `exact`: equal to the bit. Otherwise exponentials or sums in another order may move an element to a neighbouring
    code, or a scale by a last bit.
    """

    kernel: Callable
    reference: Callable
    inputs: Callable
    settings: dict
    small: tuple
    shapes: list
    exact: bool
    gathered: Callable | None = None
    """Bytes when every row counts as often as it is read, from the outputs; None: each input counts once."""


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    """Rows of many magnitudes."""
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(keys[0], shape, jnp.float32)
    return (x * jnp.exp2(jax.random.uniform(keys[1], (*shape[:-1], 1), minval=-20, maxval=20))).astype(dtype)


def wild(seed: int, *shape: int) -> jax.Array:
    """With tiles of zeros, subnormals, infinities and NaNs."""
    x = normal(seed, *shape).at[3].set(0).at[5].set(1e-40).at[7, 1].set(jnp.inf).at[9, 40].set(jnp.nan)
    return x.at[:, 17].set(-0.0)


def padded(x_MK: jax.Array) -> jax.Array:
    """To whole tiles."""
    return jnp.pad(x_MK, [(0, -size % 128) for size in x_MK.shape])


def rows_in_jnp(x_MK: jax.Array, operand: Operand) -> Tiles:
    fmt = format_of(operand.format)
    # The largest of the bits of magnitudes: XLA's maximum of numbers loses NaNs on a CPU.
    magnitudes = jax.lax.bitcast_convert_type(jnp.abs(x_MK.astype(jnp.float32)), jnp.int32)
    amax = jnp.max(magnitudes.reshape(len(x_MK), -1, 128), axis=-1)
    scales = scale_of(jax.lax.bitcast_convert_type(amax, jnp.float32), fmt, power_of_two=operand.power_of_two)
    scaled = x_MK.astype(jnp.float32) * jnp.repeat(1 / scales, 128, axis=1)
    values = round_to(scaled, fmt).astype(jnp.bfloat16) if fmt.dtype is None else scaled.astype(fmt.dtype)
    return Tiles(values, scales.T)


def numbers_of(tiles: Tiles) -> jax.Array:
    """float32."""
    return tiles.values.astype(jnp.float32) * jnp.repeat(tiles.scales.T, 128, axis=1)


def permute_in_jnp(values: jax.Array, scales: jax.Array, token_J: jax.Array) -> Tiles:
    fill = lambda x, axis, value: jnp.take(x, token_J, axis=axis, mode="fill", fill_value=value)
    return Tiles(fill(values, 0, 0), fill(scales, 1, 1))


def permute_inputs(n_tokens: int, d: int, n_rows: int) -> list[jax.Array]:
    """Rows in the order of 8 experts that every token goes to, and some padding."""
    tiles = jax.jit(lambda x: rows_in_jnp(x, E4M3))(normal(0, n_tokens, d))
    token_J = jnp.tile(jnp.arange(n_tokens, dtype=jnp.int32), n_rows // n_tokens)
    token_J = jax.random.permutation(jax.random.key(1), token_J)
    return [*tiles, jnp.where(jnp.arange(n_rows) % 509 == 7, n_tokens, token_J).astype(jnp.int32)]


def combine_in_jnp(rows_JD: jax.Array, row_TK: jax.Array, weights_TK: jax.Array | None) -> jax.Array:
    chosen_TKD = rows_JD[row_TK].astype(jnp.float32)
    weighted = chosen_TKD if weights_TK is None else chosen_TKD * weights_TK[..., None]
    return sum(weighted[:, k] for k in range(row_TK.shape[1])).astype(rows_JD.dtype)


def combine_inputs(n_tokens: int, d: int) -> list[jax.Array]:
    """8 choices."""
    row_TK = jax.random.permutation(jax.random.key(1), 8 * n_tokens).reshape(n_tokens, 8).astype(jnp.int32)
    return [jax.random.normal(jax.random.key(0), (8 * n_tokens, d), jnp.bfloat16), row_TK,
            jax.random.uniform(jax.random.key(2), (n_tokens, 8))]


def swiglu_backward_in_jnp(values: jax.Array, scales: jax.Array, d_h_MF: jax.Array, weight_M: jax.Array):
    gate, up = jnp.split(numbers_of(Tiles(values, scales)), 2, axis=1)
    d_h, sigmoid = d_h_MF.astype(jnp.float32), jax.nn.sigmoid(gate)
    h = gate * sigmoid * up
    d_weight_M, d_h = jnp.sum(h * d_h, axis=1), d_h * weight_M[:, None]
    d_gate_up = jnp.concatenate([d_h * up * sigmoid * (1 + gate * (1 - sigmoid)), d_h * gate * sigmoid], axis=1)
    return (rows_in_jnp(d_gate_up, E4M3), rows_in_jnp(d_gate_up.T, E4M3),
            rows_in_jnp((h * weight_M[:, None]).T, E4M3), d_weight_M)


def swiglu_backward_inputs(m: int, f: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    kept = jax.jit(lambda x: rows_in_jnp(x, E4M3))(jax.random.normal(keys[0], (m, f), jnp.bfloat16))
    return [*kept, jax.random.normal(keys[1], (m, f // 2), jnp.bfloat16), jax.random.uniform(keys[2], (m,))]


def weights_in_jnp(w: jax.Array) -> tuple[Blocks, Blocks]:
    *stack, d, f = w.shape
    blocks = w.reshape(*stack, d // 128, 128, f // 128, 128)
    scales = scale_of(jnp.max(jnp.abs(blocks), axis=(-3, -1)), E4M3_FORMAT, power_of_two=False)
    values = (blocks * (1 / scales)[..., :, None, :, None]).astype(jnp.float8_e4m3fn).reshape(w.shape)
    return Blocks(values.swapaxes(-2, -1), scales.swapaxes(-2, -1)), Blocks(values, scales)


def settings_of(name: str, *choices: tuple[int, int, int]) -> dict:
    return {f"{name} {choice}": Streaming(*choice) for choice in choices}


TOKENS = [(4096, 7168), (16384, 7168), (32768, 7168)]
ONE_FORM = [(1, 2, 1), (1, 3, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2), (3, 2, 2), (1, 2, 2), (4, 1, 2), (2, 1, 2)]
TWO_FORMS = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1), (3, 1, 1), (2, 1, 2), (3, 1, 2), (4, 1, 2)]

REQUANTIZE = [(1, 2, 1), (1, 3, 1), (2, 2, 1), (1, 2, 2), (1, 3, 2), (2, 2, 2), (3, 2, 2), (4, 1, 2)]

CASES = {
    "rows": Case(
        lambda x, s: quantize_hopper.quantize_rows(x, E4M3, s), lambda x: rows_in_jnp(x, E4M3),
        lambda m, k: [normal(0, m, k)], settings_of("rows", *ONE_FORM), (384, 512), TOKENS, True),
    "columns": Case(
        lambda x, s: quantize_hopper.quantize_columns(x, E4M3, s), lambda x: rows_in_jnp(x.T, E4M3),
        lambda m, k: [normal(0, m, k)], settings_of("columns", *ONE_FORM), (384, 512), TOKENS, True),
    "both": Case(
        lambda x, s: quantize_hopper.quantize_both(x, E4M3, E4M3, s),
        lambda x: (rows_in_jnp(x, E4M3), rows_in_jnp(x.T, E4M3)),
        lambda m, k: [normal(0, m, k)], settings_of("both", *TWO_FORMS), (384, 512), TOKENS, True),
    "both, ragged": Case(
        lambda x, s: quantize_hopper.quantize_both(x, E4M3, E4M3, s),
        lambda x: (rows_in_jnp(padded(x), E4M3), rows_in_jnp(padded(x).T, E4M3)),
        lambda m, k: [normal(0, m, k)], settings_of("both", (2, 1, 1), (2, 2, 1)), (200, 576), [(16384, 2112)], True),
    "both, special numbers": Case(
        lambda x, s: quantize_hopper.quantize_both(x, E5M2_POWER, E5M6_POWER, s),
        lambda x: (rows_in_jnp(x, E5M2_POWER), rows_in_jnp(x.T, E5M6_POWER)),
        lambda m, k: [wild(0, m, k)], settings_of("both", (2, 1, 1)), (384, 512), [], True),
    "weights": Case(
        lambda w, s: weights_quantize_hopper.quantize_weights(w, BLOCK, s), weights_in_jnp,
        lambda *shape: [normal(0, *shape, dtype=jnp.float32)],
        settings_of("weights", (1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 1, 2)), (2, 256, 384), [(8, 7168, 4096)], True),
    "norm": Case(
        lambda x, gain, s: norm_quantize_hopper.norm_quantize(x, gain, 1e-6, E4M3, None, s)[0],
        lambda x, gain: rows_in_jnp(rms_norm(x, gain, 1e-6), E4M3),
        lambda m, k: [normal(0, m, k), normal(1, 1, k, dtype=jnp.float32)[0]],
        settings_of("norm", (2, 1, 4), (1, 1, 4), (2, 1, 2), (4, 1, 2), (1, 2, 2), (2, 2, 1), (1, 3, 1), (2, 2, 2),
                    (1, 4, 1)),
        (384, 1536), [*TOKENS[:2], (16384, 1536), (16384, 512)], False),
    "norm, both": Case(
        lambda x, gain, s: norm_quantize_hopper.norm_quantize(x, gain, 1e-6, E4M3, E4M3, s),
        lambda x, gain: (rows_in_jnp(rms_norm(x, gain, 1e-6), E4M3), rows_in_jnp(rms_norm(x, gain, 1e-6).T, E4M3)),
        lambda m, k: [normal(0, m, k), normal(1, 1, k, dtype=jnp.float32)[0]],
        settings_of("norm", (2, 1, 4)), (384, 1536), TOKENS[:2], False),
    "swiglu": Case(
        lambda x, s: swiglu_quantize_hopper.swiglu_quantize(x, E4M3, E4M3, s),
        lambda x: (rows_in_jnp(swiglu(x), E4M3), rows_in_jnp(x, E4M3)),
        lambda m, f: [jax.random.normal(jax.random.key(0), (m, f), jnp.bfloat16)],
        settings_of("swiglu", (1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 1, 2)), (384, 512), [(131072, 4096)], False),
    "swiglu backward": Case(
        lambda v, c, d, w, s: swiglu_quantize_hopper.swiglu_backward_quantize(Tiles(v, c), d, w, E4M3, E4M3, E4M3, s),
        swiglu_backward_in_jnp, swiglu_backward_inputs,
        settings_of("swiglu backward", (1, 1, 1), (1, 1, 2)), (384, 512), [(131072, 4096)], False),
    "permute": Case(
        lambda v, c, t, s: permute_hopper.permute_tiles(Tiles(v, c), t, s), permute_in_jnp, permute_inputs,
        settings_of("permute", (1, 4, 4), (2, 2, 4), (3, 2, 4), (6, 1, 4), (2, 4, 2), (2, 3, 4), (3, 4, 2), (2, 2, 8)),
        (512, 256, 2048), [(16384, 7168, 131072)], True, lambda out: 2 * out),
    "combine": Case(
        lambda rows, row, weights, s: permute_hopper.combine_rows(rows, row, weights, s), combine_in_jnp,
        combine_inputs,
        settings_of("combine", (2, 2, 1024), (2, 4, 1024), (3, 4, 1024), (4, 3, 1024), (3, 2, 1024), (2, 2, 2048),
                    (2, 1, 3584), (4, 4, 512), (6, 4, 512), (2, 6, 1024)),
        (256, 1024), [(16384, 7168)], False),
    "combine without weights": Case(
        lambda rows, row, s: permute_hopper.combine_rows(rows, row, None, s),
        lambda rows, row: combine_in_jnp(rows, row, None), lambda t, d: combine_inputs(t, d)[:2],
        settings_of("combine", (3, 4, 1024)), (256, 1024), [(16384, 7168)], False),
    "requantize columns": Case(
        lambda v, c, s: quantize_hopper.requantize_columns(Tiles(v, c), E4M3_POWER, s),
        lambda v, c: rows_in_jnp(numbers_of(Tiles(v, c)).T, E4M3_POWER),
        lambda m, k: list(jax.jit(lambda x: rows_in_jnp(x, E4M3))(normal(0, m, k))),
        settings_of("requantize", *REQUANTIZE), (384, 512), TOKENS[:2], True),
    "requantize E5M6": Case(
        lambda v, c, s: quantize_hopper.requantize_columns(Tiles(v, c), E4M3_POWER, s),
        lambda v, c: rows_in_jnp(numbers_of(Tiles(v, c)).T, E4M3_POWER),
        lambda m, k: list(jax.jit(lambda x: rows_in_jnp(x, E5M6_POWER))(normal(0, m, k))),
        settings_of("requantize", (2, 2, 1), (2, 2, 2)), (384, 512), TOKENS[:2], True),
}


def bits(x: jax.Array) -> jax.Array:
    """Its bits as integers, one number for every NaN."""
    integer = jax.lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")
    return jnp.where(jnp.isnan(x.astype(jnp.float32)), jnp.iinfo(integer.dtype).max, integer)


@partial(jax.jit, static_argnums=2)
def differing(actual, expected, exact: bool = True) -> list[jax.Array]:
    """The share of elements of every array that differ in their bits; not `exact`: of float32, by more than 1e-5."""
    def share(a, b):
        if a.dtype == jnp.float32 and not exact:
            return jnp.mean(jnp.logical_not(jnp.abs(a - b) <= 1e-5 * (jnp.abs(b) + jnp.mean(jnp.abs(b)))))
        return jnp.mean(bits(a) != bits(b), dtype=jnp.float32)

    return [share(a, b) for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)]


def poison(like) -> None:
    """Leave memory of the sizes of these arrays full of NaNs, for the next program to be given."""
    jax.block_until_ready([jnp.full(x.shape, jnp.nan, x.dtype) for x in jax.tree.leaves(like)])


def seconds(function: Callable, inputs: list[jax.Array], n_bytes: int) -> float:
    """Median over five runs of one program that calls `function` on several copies of its inputs in turn.

    One program, because launching each call from the host takes as long as a small kernel; several copies, so that no
    call finds its inputs in the cache.
    """
    n_calls = int(np.clip(MEMORY // n_bytes, 2, 20))
    inner = jax.jit(function)
    program = jax.jit(lambda copies: [inner(*copy) for copy in copies])
    copies = [jax.tree.map(jnp.copy, inputs) for _ in range(n_calls)]
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(program(copies))
        times.append((time.perf_counter() - start) / n_calls)
    return sorted(times[1:])[2]


def copy_rate() -> float:
    """GB/s of a large copy, bytes read and written."""
    big = jnp.ones((2 ** 14, 2 ** 15), jnp.bfloat16)
    return 2e-9 * big.nbytes / seconds(lambda x: x * 2, [big], 2 * big.nbytes)


def check(case: Case, setting, repeats: int) -> str:
    """A line that starts with `ok` or says what is wrong."""
    inputs = case.inputs(*case.small)
    expected = jax.jit(case.reference)(*inputs)
    run = jax.jit(lambda *a: case.kernel(*a, setting)).lower(*inputs).compile()
    poison(expected)
    first = run(*inputs)
    shares = [float(share) for share in differing(first, expected, case.exact)]
    changes = 0.0
    for _ in range(repeats - 1):
        changes += sum(float(share) for share in differing(run(*inputs), first))
    bound = 0 if case.exact else 0.01
    verdict = "ok" if max(shares) <= bound and changes == 0 else "WRONG"
    shares = " ".join(f"{share:.2g}" for share in shares)
    return f"{verdict} differing {shares}, changes over {repeats} runs {changes:.2g}"


def moved(inputs, outputs) -> int:
    """Bytes of all inputs and outputs."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs)))


def measure(case: Case, shape, setting, copy: float) -> str:
    inputs = case.inputs(*shape)
    kernel = lambda *a: case.kernel(*a, setting)
    outputs = jax.eval_shape(kernel, *inputs)
    counts = {"": moved(inputs, outputs)}
    time_s = seconds(kernel, inputs, counts[""])
    if case.gathered is not None:
        counts[", counting repeated reads"] = case.gathered(moved((), outputs))
    rates = (f"{1e-9 * n_bytes / time_s:6.0f} GB/s {1e-9 * n_bytes / time_s / copy:6.1%} of a copy{how}"
             for how, n_bytes in counts.items())
    return f"{1e6 * time_s:9.1f} us {' '.join(rates)}"


def reference_line(case: Case, shape) -> str:
    inputs = case.inputs(*shape)
    n_bytes = moved(inputs, jax.eval_shape(case.reference, *inputs))
    time_s = seconds(case.reference, inputs, n_bytes)
    return f"{1e6 * time_s:9.1f} us {1e-9 * n_bytes / time_s:6.0f} GB/s"


def attempt(function: Callable, *arguments) -> str:
    """Its line, or the first line of what it raised: one kernel that fails must not hide the others."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001
        return f"FAILED {type(error).__name__}: {str(error).splitlines()[0][:160]}"


def main(arguments: Sequence[str]) -> None:
    """`arguments`: a pattern of the cases to run (all without one); `quick` times only the first shape of each."""
    quick = "quick" in arguments
    pattern = next((argument for argument in arguments if argument != "quick"), "")
    print(f"{jax.devices()[0].device_kind}, jax {version('jax')}")
    copy = copy_rate()
    print(f"copy {copy:.0f} GB/s", flush=True)
    for name, case in CASES.items():
        if not re.search(pattern, name):
            continue
        right = {}
        for index, (label, setting) in enumerate(case.settings.items()):
            line = attempt(check, case, setting, FEW if index else REPEATS)
            right[label] = line.startswith("ok")
            print(f"{name:24} {label:24} {line}", flush=True)
        for shape in case.shapes[:1] if quick else case.shapes:
            print(f"{name:24} {'jnp':24} {shape!s:22} {attempt(reference_line, case, shape)}", flush=True)
            for label, setting in case.settings.items():
                if right[label]:
                    line = attempt(measure, case, shape, setting, copy)
                    print(f"{name:24} {label:24} {shape!s:22} {line}", flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
