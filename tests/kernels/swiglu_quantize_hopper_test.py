"""SwiGLU with quantised results, interpreted on the CPU, against the same formulas in jnp and `dsv3.quant`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_kernels import E4M3, OPERANDS, assert_close, assert_same, interpreted, numbers_of, reference, slow

from dsv3.config import UserError
from dsv3.kernels.scaled import Tiles
from dsv3.kernels.stream_hopper import Streaming
from dsv3.kernels.swiglu import swiglu
from dsv3.kernels.swiglu_quantize_hopper import swiglu_backward_quantize, swiglu_quantize

SETTINGS = {"two parts": Streaming(1, 1, 2, 1), "two stages": Streaming(2, 1, 1, 1)}
BACKWARD = {
    "four parts": Streaming(2, 1, 4, 1), "one tile": Streaming(1, 1, 4, 1), "two parts": Streaming(1, 1, 2, 1)}
E5M2_POWER = OPERANDS[3]


def normal(seed, *shape, dtype=jnp.bfloat16):
    return 3 * jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kept", [E4M3, None, *slow(E5M2_POWER)])
def test_forward(settings, kept):
    gate_up_MF = normal(0, 200, 512)
    h, waiting = interpreted(lambda x: swiglu_quantize(x, E4M3, kept, settings), gate_up_MF)
    assert_close(h, reference(swiglu(gate_up_MF), E4M3))
    if kept is None:
        np.testing.assert_array_equal(waiting, gate_up_MF)
    else:
        assert_same(waiting, reference(gate_up_MF, kept))


def gradients(gate_up, d_h, weight):
    """Of weight * silu(gate) * up, by differentiating it; with weight * h and sum of h * d_h."""
    def h_of(gate_up):
        gate, up = jnp.split(gate_up, 2, axis=1)
        return jax.nn.silu(gate) * up

    h, vjp = jax.vjp(h_of, gate_up)
    return vjp(weight[:, None] * d_h)[0], weight[:, None] * h, jnp.sum(h * d_h, axis=1)


@pytest.mark.parametrize("settings", BACKWARD.values(), ids=BACKWARD)
@pytest.mark.parametrize("kept, weighted", [(E4M3, True), *slow((E4M3, False), (OPERANDS[5], True), (None, True))])
def test_backward(settings, kept, weighted):
    gate_up_MF, d_h_MF = normal(0, 128, 512), normal(1, 128, 256)
    weight_M = jax.random.uniform(jax.random.key(2), (128,)) if weighted else jnp.ones(128)
    if kept != E4M3:  # twice as wide, which leaves room for one tile
        settings = settings._replace(stages=1)
    h_columns = E5M2_POWER if settings.stages > 1 else E4M3  # and so do two formats along columns
    kept = gate_up_MF if kept is None else reference(gate_up_MF, kept)
    numbers = jnp.asarray(numbers_of(kept) if isinstance(kept, Tiles) else kept, jnp.float32)
    d_gate_up, weighted_h, d_weight = gradients(numbers, d_h_MF.astype(jnp.float32), weight_M)
    d_gate_up, weighted_h = (x.astype(jnp.bfloat16) for x in (d_gate_up, weighted_h))
    actual = interpreted(
        lambda kept, d_h, weight: swiglu_backward_quantize(
            kept, d_h, weight if weighted else None, E4M3, E5M2_POWER, h_columns, settings),
        kept, d_h_MF, weight_M)
    assert_close(actual[0], reference(d_gate_up, E4M3))
    assert_close(actual[1], reference(d_gate_up.T, E5M2_POWER))
    assert_close(actual[2], reference(weighted_h.T, h_columns))
    if weighted:
        np.testing.assert_allclose(actual[3], d_weight, rtol=1e-4, atol=1e-3)
    else:
        assert actual[3] is None


def spoiled(tiles: Tiles, where) -> None:
    """NaN in the codes and scales of these (row, tile), and nowhere else."""
    expected = np.zeros(tiles.scales.T.shape, bool)
    for row, tile in where:
        expected[row, tile] = True
    np.testing.assert_array_equal(np.isnan(tiles.scales).T, expected)
    np.testing.assert_array_equal(np.isnan(np.asarray(tiles.values, np.float32)), np.repeat(expected, 128, axis=1))


@pytest.mark.parametrize("half", [0, 1])
def test_a_nan_spoils_its_own_tiles_only(half):
    """Of gate or of up, forward."""
    gate_up_MF = normal(0, 128, 512).at[7, 256 * half + 130].set(jnp.nan)
    h, waiting = interpreted(lambda x: swiglu_quantize(x, E4M3, E4M3, SETTINGS["two parts"]), gate_up_MF)
    spoiled(h, [(7, 1)])
    spoiled(waiting, [(7, 1 + 2 * half)])


@pytest.mark.parametrize("of_gradient", [True, False])
def test_a_nan_spoils_its_own_tiles_only_backward(of_gradient):
    """Of the gradient of h, which h does not see, or of gate, with rows of padding behind it."""
    gate_up_MF, d_h_MF = normal(0, 130, 256), normal(1, 130, 128)
    if of_gradient:
        d_h_MF = d_h_MF.at[129, 3].set(jnp.nan)
    else:
        gate_up_MF = gate_up_MF.at[129, 3].set(jnp.nan)
    rows, columns, h_columns, d_weight = interpreted(
        lambda kept, d_h, weight: swiglu_backward_quantize(
            kept, d_h, weight, E4M3, E4M3, E4M3, BACKWARD["two parts"]), gate_up_MF, d_h_MF, jnp.ones(130))
    spoiled(rows, [(129, 0), (129, 1)])
    spoiled(columns, [(3, 1), (131, 1)])
    spoiled(h_columns, [] if of_gradient else [(3, 1)])
    np.testing.assert_array_equal(np.isnan(d_weight), np.arange(130) == 129)


@pytest.mark.slow
def test_rows_of_padding_change_nothing():
    gate_up_MF, d_h_MF = normal(0, 130, 256), normal(1, 130, 128)
    whole = [jnp.pad(x, ((0, 126), (0, 0))) for x in (gate_up_MF, d_h_MF)]
    run = lambda *arrays: interpreted(
        lambda kept, d_h, weight: swiglu_backward_quantize(
            kept, d_h, weight, E4M3, E4M3, E4M3, SETTINGS["two parts"]), *arrays)
    ragged, padded = run(gate_up_MF, d_h_MF, jnp.ones(130)), run(*whole, jnp.ones(256))
    for got, wanted in zip(ragged[:3], padded[:3], strict=True):
        assert_same(got, wanted)
    np.testing.assert_array_equal(ragged[3], padded[3][:130])


def test_halves_of_broken_tiles_are_refused():
    with pytest.raises(UserError, match="384 columns; expected a multiple of 256"):
        swiglu_quantize(normal(0, 128, 384), E4M3, None)
