"""RMSNorm, forward and backward, at the widths of V3 and small_moe: python -m experiments.benchmark norm [--only=TEXT]

Against the copy bandwidth measured in the same run, counting x and the result (4 bytes an element) or x and both
gradients (6).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dsv3.kernels.norm import rms_norm
from dsv3.kernels.norm_hopper import rms_norm_hopper
from experiments import benchmark_table
from experiments.benchmark_table import BF16_FLOPS, Case, Contestant, normal

EPS = 1e-6
SHAPES = ((16_384, 7168), (16_384, 1536), (16_384, 512), (65_536, 1280))
FORMS: dict[str, Callable] = {"one read": rms_norm_hopper, "XLA": rms_norm}


def gradients(
        norm: Callable, x_MK: jax.Array, gain_K: jax.Array, d_out_MK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By x and by the gain."""
    return jax.vjp(lambda x, gain: norm(x, gain, EPS), x_MK, gain_K)[1](d_out_MK)


def norm_cases(m: int, k: int) -> list[Case]:
    """The result alone, and both gradients alone: what a forward and a backward pass compute."""
    def inputs(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        return normal(3 * seed, m, k), normal(3 * seed + 1, k, dtype=jnp.float32), normal(3 * seed + 2, m, k)

    two = lambda x, gain, d_out: (x, gain)
    forward = {form: Contestant(
        lambda x, gain, norm=norm: norm(x, gain, EPS), lambda x, gain: rms_norm(x.astype(jnp.float32), gain, EPS), two)
        for form, norm in FORMS.items()}
    backward = {form: Contestant(
        lambda *arrays, norm=norm: gradients(norm, *arrays),
        lambda x, gain, d_out: gradients(rms_norm, x.astype(jnp.float32), gain, d_out.astype(jnp.float32)))
        for form, norm in FORMS.items()}
    return [Case("forward", f"{m} x {k}", inputs, forward, 0, 4 * m * k, BF16_FLOPS),
            Case("backward", f"{m} x {k}", inputs, backward, 0, 6 * m * k, BF16_FLOPS)]


def cases() -> list[Case]:
    return [case for shape in SHAPES for case in norm_cases(*shape)]


def main(overrides: Sequence[str]) -> None:
    benchmark_table.run("norm", cases(), "gb_per_s", overrides)
