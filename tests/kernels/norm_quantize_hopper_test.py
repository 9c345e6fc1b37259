"""RMSNorm with quantised results, interpreted on the CPU, against `rms_norm` and `dsv3.quant`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_kernels import E4M3, OPERANDS, assert_close, interpreted, reference, slow

from dsv3.config import UserError
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.norm_quantize_hopper import norm_quantize, refusal
from dsv3.kernels.stream_hopper import Streaming

EPS = 1e-6
SETTINGS = {"two rows": Streaming(2, 1, 2, 3), "one row": Streaming(3, 1, 1, 2)}
COLUMNS = Streaming(1, 1, 2, 2)
E5M2_POWER = OPERANDS[3]


def problem(m, k):
    """Rows of many magnitudes, some of them zero."""
    rng = np.random.default_rng(0)
    x_MK = rng.standard_normal((m, k)) * 2.0 ** rng.integers(-12, 12, (m, 1))
    x_MK[3] = 0
    return jnp.asarray(x_MK, jnp.bfloat16), jnp.asarray(rng.random(k) + 0.5, jnp.float32)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("m, k", [(40, 512), (40, 640), *slow((128, 128), (128, 1024), (128, 1280))])
def test_rows_and_columns_of_the_normalised(settings, m, k):
    x_MK, gain_K = problem(m, k)
    rows, columns = interpreted(
        lambda x, gain: norm_quantize(x, gain, EPS, E4M3, E5M2_POWER, settings, COLUMNS), x_MK, gain_K)
    normed_MK = rms_norm(x_MK, gain_K, EPS)
    assert_close(rows, reference(normed_MK, E4M3))
    assert_close(columns, reference(normed_MK.T, E5M2_POWER))


def test_columns_only_where_asked_for():
    x_MK, gain_K = problem(128, 512)
    run = lambda x, gain: norm_quantize(x, gain, EPS, E4M3, None, SETTINGS["one row"])
    assert interpreted(run, x_MK, gain_K)[1] is None


def test_a_nan_spoils_its_own_row_only():
    x_MK, gain_K = problem(128, 512)
    run = lambda x, gain: norm_quantize(x, gain, EPS, E4M3, None, SETTINGS["two rows"])
    rows, _ = interpreted(run, x_MK.at[7, 3].set(jnp.nan), gain_K)
    np.testing.assert_array_equal(np.isnan(np.asarray(rows.values, np.float32)).all(axis=1), np.arange(128) == 7)


@pytest.mark.parametrize("n_tiles", [1, 5, 7, 9, 12, 13, 14, 15, 16, 17, 20, 21, 56])
def test_every_width_is_refused_or_a_program_for_a_gpu(n_tiles):
    """The interpreter copies what the copy engine does not."""
    shape, k = jax.ShapeDtypeStruct, 128 * n_tiles
    shapes = shape((128, k), jnp.bfloat16), shape((k,), jnp.float32)
    assert (refusal(k) is not None) == (n_tiles in (13, 14, 15, 21))
    if refusal(k) is None:
        norm = jax.jit(lambda x, gain: norm_quantize(x, gain, EPS, E4M3, E4M3)).trace(*shapes)
        assert norm.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 2


@pytest.mark.parametrize("width, eps, split, wanted", [
    (576, EPS, 2, "rows of 576 elements: they must be multiples of 128"), (512, EPS, 3, "`split` must divide 128"),
    (512, 0.0, 2, "eps 0.0; expected a positive number")])
def test_what_cannot_be_right_is_refused(width, eps, split, wanted):
    with pytest.raises(UserError, match=wanted):
        norm_quantize(*problem(128, width), eps, E4M3, None, Streaming(2, 1, split))


@pytest.mark.slow
def test_the_formula_is_that_of_the_library():
    """`assert_close` forgives neighbouring codes; most tiles must be equal to the bit."""
    x_MK, gain_K = problem(128, 512)
    rows, _ = interpreted(lambda x, gain: norm_quantize(x, gain, EPS, E4M3, None, SETTINGS["two rows"]), x_MK, gain_K)
    expected = reference(jax.jit(rms_norm, static_argnums=2)(x_MK, gain_K, EPS), E4M3)
    assert np.mean(np.asarray(rows.scales) == np.asarray(expected.scales)) > 0.99
