"""Record what Hopper's FP8 tensor cores make of chosen inputs: PYTHONPATH=. python tests/goldens/record_wgmma.py

Needs an H100 or H200. Writes tests/goldens/wgmma_e4m3.npz, by family: codes `a` [m, k] and `b` [n, k], and the bits
of the float32 result `out` [m, n] of one accumulator over all of k. Recorded on 2026-11-22, H100 80GB HBM3, jax 0.11.2;
a repetition on the same inputs was equal. If a newer GPU differs, that is a finding about the GPU: keep both files.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS, COLUMNS, DEPTH = 64, 128, 128
KEPT = 16, 24
"""Rows and columns of each product that the file keeps; 4 and 8 of those that are deep."""


def transforms(elements: int) -> tuple:
    return plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(128)


def tensor_core(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [z, 64, k] b [z, 128, k]^T, float32 [z, 64, 128]: one accumulator over all of k."""
    z, _, k = a.shape

    def kernel(a_ref, b_ref, out_ref):
        def scoped(a_smem, b_smem, out_smem, full):
            index = jax.lax.axis_index("z")

            def accumulate(acc):
                def step(number, count):
                    depth = pl.ds(number * DEPTH, DEPTH)
                    plgpu.copy_gmem_to_smem(a_ref.at[index, :, depth], a_smem, full)
                    plgpu.copy_gmem_to_smem(b_ref.at[index, :, depth], b_smem, full)
                    plgpu.barrier_wait(full)
                    plgpu.wgmma(acc, a_smem, b_smem.transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    return count + 1

                jax.lax.fori_loop(0, k // DEPTH, step, jnp.int32(0))
                return acc[...]

            total = pl.run_scoped(accumulate, plgpu.ACC((ROWS, COLUMNS)))
            for start in range(0, COLUMNS, 32):
                out_smem[...] = total[:, start:start + 32]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem, out_ref.at[index, :, pl.ds(start, 32)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=False)

        pl.run_scoped(scoped, plgpu.SMEM((ROWS, DEPTH), jnp.float8_e4m3fn, transforms=transforms(128)),
                      plgpu.SMEM((COLUMNS, DEPTH), jnp.float8_e4m3fn, transforms=transforms(128)),
                      plgpu.SMEM((ROWS, 32), jnp.float32, transforms=transforms(32)), plgpu.Barrier(num_arrivals=2))

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((z, ROWS, COLUMNS), jnp.float32), grid=(z,), grid_names=("z",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup))(a, b)


def families(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> a [z, 64, k], b [z, 128, k], float64 before they are rounded to E4M3."""
    powers = lambda low, high, shape: 2.0 ** rng.integers(low, high, shape) * rng.choice([-1, 1], shape)
    normal = lambda z, rows, k: rng.standard_normal((z, rows, k))

    def first32(x):
        return np.where(np.arange(x.shape[-1]) < 32, x, 0)

    def wide(z, rows, k):
        return normal(z, rows, k) * powers(-9, 9, (z, rows, k))

    out = {"normal32": (first32(normal(4, ROWS, 128)), first32(normal(4, COLUMNS, 128))),
           "wide32": (first32(wide(6, ROWS, 128)), first32(wide(6, COLUMNS, 128)))}
    # A power of two, and a product with more mantissa at any distance from it: in one step, then in the next, then with
    # the power of two taken away again, later and in the same step.
    a, b = np.zeros((6, ROWS, 128)), np.zeros((6, COLUMNS, 128))
    a[..., 0], b[..., 0] = powers(-6, 9, (6, ROWS)), powers(-6, 9, (6, COLUMNS))
    a[..., 5] = rng.choice([1.875, 1.75, 1.125, -1.875, -1.125], (6, ROWS)) * 2.0 ** rng.integers(-6, 9, (6, ROWS))
    b[..., 5] = rng.choice([1.875, 1.25, 1.125, -1.625], (6, COLUMNS)) * 2.0 ** rng.integers(-6, 9, (6, COLUMNS))
    out["two"] = a, b
    later = lambda x: np.where(np.arange(128) == 40, x[..., 5:6], np.where(np.arange(128) == 5, 0, x))
    out["two_steps"] = later(a), later(b)
    cancelled = lambda x, sign, place: np.where(np.arange(128) == place, sign * x[..., :1], x)
    out["cancel_later"] = cancelled(later(a), -1, 100), cancelled(later(b), 1, 100)
    out["cancel_inside"] = cancelled(a, -1, 9), cancelled(b, 1, 9)
    out["subnormal"] = (rng.integers(-7, 8, (3, ROWS, 128)) * 2.0 ** -9,
                        normal(3, COLUMNS, 128) * powers(-9, 3, (3, COLUMNS, 128)))
    out["normal128"] = normal(4, ROWS, 128), normal(4, COLUMNS, 128)
    out["uniform128"] = rng.uniform(0, 1, (3, ROWS, 128)), rng.uniform(0, 1, (3, COLUMNS, 128))
    out["normal4096"] = normal(1, ROWS, 4096) * 4, normal(1, COLUMNS, 4096) * 4
    out["uniform4096"] = rng.uniform(0, 448, (1, ROWS, 4096)), rng.uniform(0, 448, (1, COLUMNS, 4096))
    out["wide512"] = wide(3, ROWS, 512), wide(3, COLUMNS, 512)
    bad = normal(1, ROWS, 128)
    bad[0, 3, 7] = np.nan
    out["nan"] = bad, normal(1, COLUMNS, 128)
    return out


def main() -> None:
    kept = {}
    for name, (a, b) in families(np.random.default_rng(0)).items():
        a, b = (np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn) for x in (a, b))
        results = [np.asarray(jax.jit(tensor_core)(jnp.asarray(a), jnp.asarray(b))).view(np.uint32) for _ in range(2)]
        assert np.array_equal(*results), f"{name}: two runs differ"
        m, n = KEPT if a.shape[-1] < 512 else (4, 8)
        kept |= {f"{name}.a": a[0, :m].view(np.uint8), f"{name}.b": b[0, :n].view(np.uint8),
                 f"{name}.out": results[0][0, :m, :n]}
    np.savez_compressed(Path(__file__).with_name("wgmma_e4m3.npz"), **kept)


if __name__ == "__main__":
    main()
