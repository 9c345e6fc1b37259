"""The Linear of a recipe against three products in float64 NumPy of the operands that its rule names."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import distance
from tiny_recipe import motley, seen

from dsv3.config import UserError, resolve
from dsv3.kernels.grouped_dot import block_experts, block_starts, padded_rows
from dsv3.kernels.quantized_dot import fp8_dot_general, fp8_grouped_dot, quantized_dot

RULE = resolve("fp8").default
RULES = {
    "fp8": RULE,
    "e5m6 kept": resolve("fp8").rule_of("attn.o"),
    "direct": resolve("fp8_direct").default,
    "e5m2 gradients": resolve("fp8_e5m2_gradients").default,
    "block gradients": resolve("fp8_block_gradients").default,
    "per tensor": resolve("fp8_per_tensor").default,
    "other weights backward": replace(RULE, dgrad_w=replace(RULE.dgrad_w, power_of_two=True)),
    "no two alike": motley(RULE),
    "no two alike, otherwise": motley(RULE, 1),
}
M, K, N = 70, 200, 136


def three_products(x, w, d_y, rule):
    """y, dx, dw of the quantised operands."""
    kept = x if rule.kept is None else seen(x, rule.kept)
    y = seen(x, rule.fprop_x) @ seen(w, rule.fprop_w)
    d_x = seen(d_y, rule.dgrad_dy) @ seen(w, rule.dgrad_w).T
    d_w = seen(kept.T, rule.wgrad_x) @ seen(d_y.T, rule.wgrad_dy).T
    return y, d_x, d_w


def problem(seed=0):
    rng = np.random.default_rng(seed)
    outliers = 2.0 ** rng.integers(-4, 5, (M, 1))
    return (rng.standard_normal((M, K)) * outliers, rng.standard_normal((K, N)),
            rng.standard_normal((M, N)) * outliers[::-1])


def run(function, x, w, d_y):
    y, vjp = jax.vjp(function, x, w)
    return y, *vjp(d_y.astype(y.dtype))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_three_products(rule):
    x, w, d_y = (jnp.asarray(array, jnp.float32) for array in problem())
    got = run(lambda x, w: quantized_dot(x, w, rule), x, w, d_y)
    wanted = three_products(*map(np.asarray, (x, w, d_y)), rule)
    for actual, expected in zip(got, wanted, strict=True):
        assert actual.dtype == jnp.float32 and distance(actual, expected) < 1e-6


def test_rules_differ_where_they_say_and_nowhere_else():
    """Of y, dx and dw, a change of the rule moves those that read the changed operand."""
    x, w, d_y = (jnp.asarray(array, jnp.float32) for array in problem())
    results = {name: run(lambda x, w, rule=rule: quantized_dot(x, w, rule), x, w, d_y) for name, rule in RULES.items()}
    moved = {name: [bool(distance(a, b) > 1e-6) for a, b in zip(result, results["fp8"], strict=True)]
             for name, result in results.items()}
    assert moved == {
        "fp8": [False] * 3, "e5m6 kept": [False, False, True], "direct": [False, False, True],
        "e5m2 gradients": [False, True, True], "block gradients": [False, True, False], "per tensor": [True] * 3,
        "other weights backward": [False, True, False], "no two alike": [True] * 3,
        "no two alike, otherwise": [True] * 3}


def test_dtypes_of_training():
    """bfloat16 in and out, float32 for the master weights; leading axes are tokens."""
    x, w, d_y = problem()
    x, d_y = jnp.asarray(x, jnp.bfloat16).reshape(2, 35, K), jnp.asarray(d_y, jnp.bfloat16).reshape(2, 35, N)
    y, d_x, d_w = run(lambda x, w: quantized_dot(x, w, RULE), x, jnp.asarray(w, jnp.float32), d_y)
    assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert (y.shape, d_x.shape, d_w.shape) == ((2, 35, N), (2, 35, K), (K, N))
    flat = [np.asarray(array, np.float32).reshape(M, -1) for array in (x, d_y)]
    wanted = three_products(flat[0], w.astype(np.float32), flat[1], RULE)
    for actual, expected, bound in zip((y, d_x, d_w), wanted, (4e-3, 4e-3, 1e-6), strict=True):
        assert distance(np.asarray(actual, np.float32).reshape(expected.shape), expected) < bound


def test_what_waits_is_quantised():
    """The residuals of a Linear: one byte an element of x, or 1.5, and one of w, with their scales."""
    x, w = jnp.zeros((256, 512), jnp.bfloat16), jnp.zeros((512, 384))
    for name, bytes_of_x in {"fp8": 1, "e5m6 kept": 1.5, "direct": 1}.items():
        _, vjp = jax.vjp(lambda x, w, rule=RULES[name]: quantized_dot(x, w, rule), x, w)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
        scales = 4 * (256 * 512 // 128 + 3 * 4)
        assert held == 256 * 512 * bytes_of_x + 512 * 384 + scales, name


def test_experts():
    """Each expert's rows against its own three products; experts without rows get no gradient."""
    sizes = np.array([130, 0, 5, 3])
    n_rows, sizes_E = padded_rows(int(sizes.sum()), len(sizes), 128), jnp.asarray(sizes, jnp.int32)
    starts, expert_Z = np.asarray(block_starts(sizes_E, 128)), np.asarray(block_experts(sizes_E, n_rows // 128, 128))
    rng = np.random.default_rng(0)
    w, rows, d_y = (rng.standard_normal(s).astype(np.float32) for s in ((4, K, N), (n_rows, K), (n_rows, N)))
    real = np.concatenate([np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])
    padding = np.setdiff1d(np.arange(n_rows), real)
    rows[padding], d_y[padding] = 0, 0
    for rule in (RULES["fp8"], RULES["direct"]):
        y, d_rows, d_w = run(lambda rows, w, rule=rule: fp8_grouped_dot(rows, sizes_E, w, rule),
                             *map(jnp.asarray, (rows, w, d_y)))
        for expert, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            mine = slice(start, start + 128 * -(-size // 128))
            if size == 0:
                assert (np.asarray(d_w[expert]) == 0).all() and expert not in expert_Z[:3]
                continue
            wanted = three_products(rows[mine], w[expert], d_y[mine], rule)
            for actual, expected in zip((y[mine], d_rows[mine], d_w[expert]), wanted, strict=True):
                assert distance(actual, expected) < 1e-6
        assert (np.asarray(y)[padding] == 0).all()
    with pytest.raises(UserError, match="130 rows are not whole blocks of 128"):
        fp8_grouped_dot(jnp.zeros((130, K)), sizes_E, jnp.zeros((4, K, N)), RULE)


def test_as_flax_takes_it():
    dense = nn.Dense(N, use_bias=False, dot_general=fp8_dot_general(RULE))
    x, w, d_y = (jnp.asarray(array, jnp.float32) for array in problem())
    apply = lambda x, w: dense.apply({"params": {"kernel": w}}, x)
    for got, wanted in zip(run(apply, x, w, d_y), run(lambda x, w: quantized_dot(x, w, RULE), x, w, d_y), strict=True):
        np.testing.assert_array_equal(got, wanted)
    attention = nn.DenseGeneral((2, 3), axis=(-2, -1), dot_general=fp8_dot_general(RULE))
    with pytest.raises(UserError, match="products of the last axis of x with the first of a matrix only"):
        attention.init(jax.random.key(0), jnp.zeros((4, 5, 6)))
    with pytest.raises(UserError, match="batches"):
        fp8_dot_general(RULE)(x[None], w[None], (((2,), (1,)), ((0,), (0,))))


def test_flax_in_bfloat16_rounds_masters_before_and_their_gradient_after():
    dense = nn.Dense(N, use_bias=False, dtype=jnp.bfloat16, dot_general=fp8_dot_general(RULE))
    x, w, d_y = (jnp.asarray(array, jnp.float32) for array in problem())
    x, d_y = x.astype(jnp.bfloat16), d_y.astype(jnp.bfloat16)
    y, d_x, d_w = run(lambda x, w: dense.apply({"params": {"kernel": w}}, x), x, w, d_y)
    assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    coarse = w.astype(jnp.bfloat16).astype(jnp.float32)
    wanted = run(lambda x, w: quantized_dot(x, w, RULE), x, coarse, d_y)
    for got, expected in zip((y, d_x, d_w), (*wanted[:2], wanted[2].astype(jnp.bfloat16)), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))


def test_the_dtype_that_is_asked_for_is_what_the_sum_is_rounded_to():
    """bfloat16 operands, a float32 result: as exact as float32 is. The gradient of x is bfloat16 again."""
    x, w, d_y = (jnp.asarray(array, jnp.bfloat16) for array in problem())
    hook = fp8_dot_general(RULE)
    got = run(lambda x, w: hook(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32), x, w, d_y)
    assert [array.dtype for array in got] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    wanted = three_products(*(np.asarray(array, np.float32) for array in (x, w, d_y)), RULE)
    for actual, expected, bound in zip(got, wanted, (1e-6, 4e-3, 4e-3), strict=True):
        assert distance(np.asarray(actual, np.float32), expected) < bound


@pytest.mark.parametrize("rule", ["fp8", resolve("fp8"), None], ids=["a name", "a recipe", "None"])
def test_what_is_no_rule_is_refused(rule):
    x, w = jnp.ones((128, 128)), jnp.ones((128, 128))
    for product in (lambda: fp8_dot_general(rule), lambda: quantized_dot(x, w, rule),
                    lambda: fp8_grouped_dot(x, jnp.full(1, 128), w[None], rule)):
        with pytest.raises(UserError, match=r"has a Rule, not '.*take one of a recipe, such as resolve\('fp8'\)"):
            product()


def grouped(x, w, n_sizes=2):
    return fp8_grouped_dot(x, jnp.ones(n_sizes, jnp.int32), w, RULE)


@pytest.mark.parametrize("product, x, w, said", [
    (lambda x, w: quantized_dot(x, w, RULE), (4, 200), (256, 136), "axis of x is 200, the inner axis of w is 256"),
    (lambda x, w: quantized_dot(x, w, RULE), (4, 256), (200, 136), "is 256, the inner axis of w is 200"),
    (lambda x, w: fp8_dot_general(RULE)(x, w, (((1,), (0,)), ((), ()))), (4, 200), (256, 136), "is 200, .* is 256"),
    (grouped, (128, 200), (2, 256, 136), "is 200, the inner axis of w is 256"),
    (lambda x, w: grouped(x, w, 3), (384, 128), (2, 128, 136), r"sizes have shape \(3,\), and w_EKN has 2 experts"),
    (lambda x, w: grouped(x, w, 1), (384, 128), (2, 128, 136), r"sizes have shape \(1,\), and w_EKN has 2 experts"),
], ids=["short x", "short w", "flax", "rows", "too many sizes", "too few sizes"])
def test_sizes_that_padding_would_hide_are_refused(product, x, w, said):
    with pytest.raises(UserError, match=said):
        product(jnp.ones(x), jnp.ones(w))


def test_integers_are_refused():
    with pytest.raises(UserError, match="x is int32; a product in 8 bits takes floating-point numbers"):
        quantized_dot(jnp.ones((4, 128), jnp.int32), jnp.ones((128, 136)), RULE)
    with pytest.raises(UserError, match="x is int8"):
        grouped(jnp.ones((128, 128), jnp.int8), jnp.ones((2, 128, 136)))


@pytest.mark.parametrize("place", ["x", "w", "d_y"])
def test_bad_numbers_come_out_bad(place):
    arrays = dict(zip(("x", "w", "d_y"), problem(), strict=True))
    arrays[place][3, 7] = np.nan
    y, d_x, d_w = run(lambda x, w: quantized_dot(x, w, RULE), *(jnp.asarray(a, jnp.float32) for a in arrays.values()))
    bad = {"y": np.isnan(y), "d_x": np.isnan(d_x), "d_w": np.isnan(d_w)}
    expected = {"x": {"y": [3], "d_w": []}, "w": {"y": None, "d_x": None}, "d_y": {"d_x": [3]}}[place]
    for name, rows in expected.items():
        assert bad[name].any()
        if rows:
            assert bad[name][rows].all() and not np.delete(bad[name], rows, axis=0).any()
    assert place == "w" or bad["d_w"].any()
