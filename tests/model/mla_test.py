"""Attention: causality, segments, and the two forms of one truth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILY, distance, random_batch, random_variables, transformer

from dsv3.config import AttentionConfig
from dsv3.inference.cache import empty_caches


def run_decode(config, variables, tokens_BT, chunks, cache_length=16):
    """Logits of `tokens_BT` fed to the latent cache in chunks of the given lengths."""
    model = transformer(config)
    decode = jax.jit(lambda v, t, p, c: model.apply(v, t, p, c, method="decode"))
    caches, start, logits = empty_caches(config, tokens_BT.shape[0], cache_length), 0, []
    for length in chunks:
        positions = jnp.broadcast_to(start + jnp.arange(length), (tokens_BT.shape[0], length))
        out, caches = decode(variables, tokens_BT[:, start:start + length], positions, caches)
        logits.append(out)
        start += length
    return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize("name", ["v3", "v3_yarn", "no_query_compression", "one_group", "no_dense_layer"])
def test_absorbed_decoding_equals_the_naive_forward(name):
    """Prefill of 5, then single tokens, over the latent cache, against full keys and values."""
    config = FAMILY[name]
    variables, batch = random_variables(config), random_batch(config)
    full, _ = transformer(config).apply(variables, batch, method="forward")
    decoded = run_decode(config, variables, batch.tokens_BT, [5] + [1] * 7)
    assert distance(decoded, full) < 1e-5


def test_rows_of_a_batch_may_stand_at_different_positions():
    config = FAMILY["v3"]
    model, variables, batch = transformer(config), random_variables(config), random_batch(config)
    full, _ = model.apply(variables, batch, method="forward")
    caches = empty_caches(config, 2, 16)
    ahead = jnp.stack([jnp.arange(4), jnp.arange(4)])
    _, caches = model.apply(variables, batch.tokens_BT[:, :4], ahead, caches, method="decode")
    later = jnp.array([[4], [2]])
    again = jnp.take_along_axis(batch.tokens_BT, later, axis=1)
    logits, _ = model.apply(variables, again, later, caches, method="decode")
    assert distance(logits[0, 0], full[0, 4]) < 1e-5
    assert distance(logits[1, 0], full[1, 2]) < 1e-5


def test_v3_caches_70272_bytes_per_token():
    attention = AttentionConfig(
        n_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        rope_theta=10000.0, yarn=None, norm_eps=1e-6)
    config = dataclasses.replace(
        FAMILY["v3"], n_layers=61, n_dense_layers=3, dtype="bfloat16", attention=attention)
    caches = jax.eval_shape(lambda: empty_caches(config, 1, 1))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches)) == 70_272


def test_the_future_has_no_gradient():
    """d logits[t] / d embedding[s] is exactly zero for s > t, and not zero at or before t."""
    config = FAMILY["v3"]
    model, variables, batch = transformer(config), random_variables(config), random_batch(config)

    def logit_at(embed, position):
        tokens = jnp.arange(12)[None].repeat(2, 0)
        changed = {**variables, "params": {**variables["params"], "embed": embed}}
        logits, _ = model.apply(changed, batch._replace(tokens_BT=tokens), method="forward")
        return jnp.sum(jnp.sin(logits[:, position]))

    grads = jax.jit(jax.vmap(jax.grad(logit_at), in_axes=(None, 0)))(
        variables["params"]["embed"], jnp.array([0, 4, 10]))
    size = np.abs(np.asarray(grads)).sum(axis=2)[:, :12]
    for row, position in enumerate((0, 4, 10)):
        assert np.all(size[row, position + 1:] == 0)
        assert np.all(size[row, :position + 1] > 0)


def test_packed_segments_equal_documents_on_their_own():
    """With the segment mask, two documents in a row give what each gives alone, although positions run on."""
    config = FAMILY["v3_yarn"]
    model, variables, batch = transformer(config), random_variables(config), random_batch(config)
    segments = jnp.where(jnp.arange(12) < 7, 1, 2)[None].repeat(2, 0)
    packed, _ = model.apply(variables, batch._replace(segment_ids_BT=segments), True, method="forward")
    alone = batch._replace(
        tokens_BT=jnp.roll(batch.tokens_BT, -7, axis=1), segment_ids_BT=jnp.ones_like(segments))
    expected, _ = model.apply(variables, alone, True, method="forward")
    assert distance(packed[:, 7:], expected[:, :5]) < 1e-5
    mixed, _ = model.apply(variables, batch._replace(segment_ids_BT=segments), False, method="forward")
    assert distance(mixed[:, 7:], expected[:, :5]) > 1e-2
