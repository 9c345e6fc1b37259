"""What torch runs beside our kernels computes the same thing; only where torch is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark_attention, benchmark_grouped, benchmark_loss, peers_torch
from experiments.benchmark_table import bad, measure

pytest.importorskip("torch")

COPY_RATE = 1e10
SMALL = dict(
    hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_attention_heads=2, num_key_value_heads=2,
    q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int32, jnp.uint8, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_arrays_keep_their_bits_there_and_back(dtype):
    x = (jax.random.normal(jax.random.key(0), (5, 8)) * 20).astype(dtype)
    there = peers_torch.to_torch((x, {"a": x}))
    assert str(there[0].dtype) == f"torch.{x.dtype.name}" and there[0].shape == (5, 8)
    back, inner = peers_torch.to_jax(there)
    assert back.dtype == x.dtype
    for array in (back, inner["a"]):
        np.testing.assert_array_equal(np.asarray(array).view(np.uint8), np.asarray(x).view(np.uint8))
    np.testing.assert_array_equal(peers_torch.to_jax(there[0].t()).astype(jnp.float32), x.T.astype(jnp.float32))


@pytest.mark.parametrize("cases, peer", [
    (lambda: benchmark_attention.cases_of("toy", 1, 32, 8), "cuDNN from torch"),
    (lambda: [benchmark_loss.case(64, 32, 500, ())], "torch, all logits"),
    (lambda: benchmark_grouped.cases_of("toy", "empty", 3, 300, 128, 256)[:2], "torch grouped_mm, bfloat16"),
])
def test_peers_meet_the_same_reference(cases, peer):
    for case in cases():
        alone = case._replace(contestants={peer: case.contestants[peer]})
        row = measure(alone, COPY_RATE, True, soak=0)
        assert row["errors"] == {} and bad(alone, row) == [] and row["rows"][peer]["device_us"] is None
        assert measure(alone, COPY_RATE, False, soak=0)["rows"] == {}


def test_transformers_at_a_small_slice():
    pytest.importorskip("transformers")
    figures = peers_torch.measure_slice(2, 32, 2, **SMALL)
    assert figures["tokens"] == 64 and figures["layers"] == 4
    assert figures["total_us"] == pytest.approx(figures["gradient_us"] + figures["optimizer_us"]) and (
        figures["optimizer_us"] > 0)
