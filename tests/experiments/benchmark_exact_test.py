"""The check of products to the bit: what the model gives passes; exact sums and lost NaNs do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.kernels.scaled import TILE, Blocks, decode_blocks, decode_tiles
from dsv3.kernels.scaled_products_hopper import ALIGNED, default_tuning
from dsv3.kernels.scaled_warpgroups_hopper import HALF
from dsv3.quant.accumulate import promoted_dot
from experiments import benchmark_exact
from experiments.benchmark_exact import FAMILIES, Products, family_cases
from experiments.benchmark_table import differing, reference

PRODUCTS = 5
ALL_COLUMNS = benchmark_exact.REPEATS[1] * benchmark_exact.N


def decoded(operand):
    return (decode_blocks if isinstance(operand, Blocks) else decode_tiles)(operand)


def unused(*_):
    raise AssertionError("the product under test is another one")


def share_that_differs(case):
    inputs = case.inputs(0)
    contestant = case.contestants["Hopper"]
    return float(differing(contestant.run(*inputs), reference(contestant, inputs)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(benchmark_exact, "N", TILE)
    monkeypatch.setattr(benchmark_exact, "K", 3 * TILE)
    monkeypatch.setattr(benchmark_exact, "SIZES", (130, 0, 1))
    monkeypatch.setattr(benchmark_exact, "REPEATS", (1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_in_another_accumulator_are_found(family):
    """Exact sums of a chunk, in place of 13 fraction bits."""
    exact = lambda a, b, shape, dtype: promoted_dot(
        a.values, b.values, a.scales.T, jnp.repeat(b.scales, TILE, axis=0), TILE, tensor_core=False).astype(dtype)
    case = family_cases(family, Products(exact, unused, unused, unused))[0]
    assert share_that_differs(case) > 0.001


@pytest.mark.parametrize("index", range(PRODUCTS))
def test_the_model_is_near_the_product_of_the_decoded_operands(index):
    """float32 products, one expert after the other: what the model multiplies with what is right, groups included."""
    case = family_cases("normal", Products(unused, unused, unused, unused))[index]
    a, b, *rest = inputs = case.inputs(0)
    ours = np.asarray(reference(case.contestants["Hopper"], inputs), np.float32)
    a, b = np.asarray(decoded(a)), np.asarray(decoded(b))
    if index in (0, 2, 4):
        wanted = a @ b.T
    elif index == 1:
        assert len(b) in rest[0]
        b = np.pad(b, ((0, 1), (0, 0), (0, 0)))  # of no expert
        wanted = np.concatenate([rows @ b[expert].T for rows, expert in zip(a.reshape(-1, TILE, a.shape[1]), rest[0])])
    else:
        spans = [slice(start, start + TILE * steps) for start, steps in zip(*map(np.asarray, rest))]
        wanted = np.stack([a[:, span] @ b[:, span].T for span in spans])
        assert any(span.start == span.stop for span in spans)
    wanted = np.tile(wanted, (1, 2))
    if index == 4:
        wanted = wanted[:benchmark_exact.FEW, :-benchmark_exact.BROKEN]
    assert ours.shape == wanted.shape and np.linalg.norm(ours - wanted) < 0.004 * np.linalg.norm(wanted)


def test_few_rows_take_tiles_of_half_the_rows_and_break_them():
    n = ALL_COLUMNS - benchmark_exact.BROKEN
    tuning = default_tuning(benchmark_exact.FEW, n)
    assert tuning.rows == HALF < benchmark_exact.FEW and benchmark_exact.FEW % HALF
    assert benchmark_exact.FEW % ALIGNED[0] and n % tuning.width and n % ALIGNED[1]


def test_every_family_is_what_it_says():
    operands = {family: [np.asarray(benchmark_exact.tiles(family, seed, 256, 384).values, np.float32)
                         for seed in (0, 1)] for family in FAMILIES}
    assert all(np.isnan(x).any() == (family == "NaN") for family, pair in operands.items() for x in pair)
    assert (operands["positive"][0] >= 0).all() and (np.abs(operands["subnormal"][0]) < 2 ** -6).all()
    assert all((x[:, :TILE] == 0).all() and (x[::5] == 0).all() for x in operands["zero tiles"])
    a, b = (np.asarray(decoded(benchmark_exact.tiles("cancelling", seed, 256, benchmark_exact.K))) for seed in (0, 1))
    assert (np.abs(a @ b.T) < 1e-6 * (np.abs(a) @ np.abs(b).T)).all()
    spread = np.log2(np.abs(operands["wide"][0][operands["wide"][0] != 0]))
    assert spread.max() - spread.min() > 16


def test_a_lost_nan_is_found():
    clean = lambda a, b, shape, dtype: jnp.nan_to_num(benchmark_exact.modelled(a, b)).astype(dtype)
    case = family_cases("NaN", Products(clean, unused, unused, unused))[0]
    assert 0 < share_that_differs(case) < 0.1
    kept = lambda a, b, shape, dtype: jax.jit(benchmark_exact.modelled)(a, b).astype(dtype)
    assert share_that_differs(family_cases("NaN", Products(kept, unused, unused, unused))[0]) == 0
