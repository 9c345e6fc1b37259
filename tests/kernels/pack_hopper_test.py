"""The Hopper kernels for what waits in 12 bits, interpreted on the CPU, against `dsv3.quant`: equal to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_kernels import E4M3, OPERANDS, assert_same, interpreted, name_of, numbers_of, reference, slow, wild

from dsv3.config import UserError
from dsv3.kernels import quantize
from dsv3.kernels.pack_hopper import quantize_and_pack, unpack_both
from dsv3.kernels.scaled import Tiles, pack_tiles
from dsv3.kernels.stream_hopper import Streaming
from dsv3.kernels.tile_hopper import decode_e5m6, encode_e5m6, pack, unpack
from dsv3.quant import formats
from dsv3.quant.formats import E5M6

KEPT, POWER = OPERANDS[5], OPERANDS[1]
SMALL = {"two stages": Streaming(2, 1, 2, 2), "one stage": Streaming(1, 1, 1, 2), "one block": Streaming(3, 1, 2, 1)}


@pytest.mark.parametrize("kept, streaming", [
    (KEPT, "two stages"), *slow((KEPT, "one stage"), (OPERANDS[4], "one block"), (OPERANDS[3], "two stages"))],
    ids=lambda value: value if isinstance(value, str) else name_of(value))
def test_one_read_quantises_and_packs(kept, streaming):
    x_MK = wild(0, 200, 320)
    rows, packed = interpreted(lambda x: quantize_and_pack(x, POWER, kept, SMALL[streaming]), x_MK)
    assert_same(rows, reference(x_MK, POWER))
    assert_same(packed, pack_tiles(reference(x_MK, kept), kept))


@pytest.mark.parametrize("kept, streaming", [
    (KEPT, "two stages"), *slow((KEPT, "one stage"), (OPERANDS[4], "one block"), (OPERANDS[3], "two stages"))],
    ids=lambda value: value if isinstance(value, str) else name_of(value))
def test_one_read_unpacks_for_both(kept, streaming):
    tiles = reference(wild(1, 256, 384), kept)
    x_MK, columns = interpreted(
        lambda *packed: unpack_both(Tiles(*packed), kept, E4M3, jnp.bfloat16, SMALL[streaming]),
        *pack_tiles(tiles, kept))
    numbers = numbers_of(tiles)
    assert_same((x_MK,), (jnp.asarray(numbers, jnp.bfloat16),))
    assert_same(columns, reference(numbers.T, E4M3))


@pytest.mark.parametrize("kept", [KEPT, OPERANDS[3]], ids=name_of)
def test_settings_reach_the_kernel(kept):
    """In 12 bits and in 8: these would wait for ever, which the frame refuses."""
    x_MK, stuck = jnp.zeros((128, 128), jnp.bfloat16), Streaming(1, 1, 1, behind=1)
    with pytest.raises(UserError, match="would wait for ever"):
        jax.eval_shape(lambda x: quantize_and_pack(x, POWER, kept, stuck), x_MK)


def test_the_reference_is_its_parts_and_what_was_packed_comes_back():
    x_MK = jax.random.normal(jax.random.key(0), (200, 320), jnp.bfloat16)
    rows, packed = quantize.quantize_and_pack(x_MK, POWER, KEPT)
    assert_same(rows, reference(x_MK, POWER))
    kept = reference(x_MK, KEPT)
    assert packed.values.shape == (256, 384 * 3 // 2)
    decoded, columns = quantize.unpack_both(packed, KEPT, E4M3, jnp.float32)
    assert_same((decoded,), (numbers_of(kept),))
    assert_same(columns, reference(numbers_of(kept).T, E4M3))


def test_codes_of_a_tile_are_those_of_the_format():
    """Every code, and numbers between all codes: rounding, packing, and both ways back."""
    codes = jnp.arange(4096, dtype=jnp.uint16).reshape(-1, 128)
    values = formats.decode(formats.pack(codes), E5M6, 128)
    np.testing.assert_array_equal(decode_e5m6(codes.astype(jnp.int32)), values)
    low, high = pack(codes.astype(jnp.int32))
    np.testing.assert_array_equal(jnp.concatenate([low, high], axis=1), formats.pack(codes))
    np.testing.assert_array_equal(unpack(low, high), codes)
    rng = np.random.default_rng(0)
    x = np.ldexp(rng.uniform(-1, 1, (4096, 128)), rng.integers(-26, 17, (4096, 128))).astype(np.float32)
    x[::2] = np.asarray(np.clip(x[::2], -65504, 65504), np.float16)  # ties among them
    x = jnp.clip(jnp.concatenate([x, jnp.nan_to_num(values, posinf=0, neginf=0)]), -1e5, 1e5).at[0, 0].set(jnp.nan)
    ours = jnp.concatenate(pack(encode_e5m6(x)), axis=1)
    np.testing.assert_array_equal(ours, formats.encode(x, E5M6))
