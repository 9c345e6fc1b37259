"""A proof that attention works end to end: after training, the model copies strings that it has never seen."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import model_config, recipe_of, train_config

from dsv3.config import constant
from dsv3.model.batch import Batch
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer
from dsv3.train.step import Knobs, make_init, make_train_step

LENGTH, ROWS = 40, 32
OPTIMIZED = {"xla_backend_optimization_level": 3}  # 350 steps: here the time goes into running, not into compiling
CONFIG = model_config(
    vocab_size=32, dim=64, inter_dim=128, n_layers=2, init_std=0.05, mtp=dict(depth=0),
    attention=dict(n_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
                   v_head_dim=16, rope_theta=10000.0),
    moe=dict(moe_inter_dim=64, route_scale=1.0))
TRAIN = train_config(
    seq_len=LENGTH, micro_batch_size=ROWS, batch_size=constant(ROWS), batch_increment=ROWS, balance_alpha=1e-4,
    optimizer=dict(weight_decay=0.0, moment_dtype="bfloat16"))


def repeated_strings(rng) -> tuple[Batch, np.ndarray]:
    """Rows of one random string of 8 to 16 tokens repeated to the end, and where a prediction can be a copy."""
    period = rng.integers(8, 17, ROWS)
    string = rng.integers(0, 32, (ROWS, 16))
    row = np.take_along_axis(string, np.arange(LENGTH + 1)[None] % period[:, None], axis=1).astype(np.int32)
    ones = np.ones((ROWS, LENGTH))
    batch = Batch(row[:, :-1], row[:, 1:], ones.astype(np.float32), ones.astype(np.int32))
    return batch, np.arange(LENGTH)[None] >= period[:, None]


@pytest.mark.slow
def test_the_model_learns_to_copy_repeated_random_strings():
    """Above 90% on the repeats of fresh strings (chance: 1/32), while their first appearance stays unpredictable."""
    rng = np.random.default_rng(0)
    model = Transformer(CONFIG, reference_ops(row_block=32, loss_chunk=2048))
    state = make_init(recipe_of(model, TRAIN))(0)
    knobs = Knobs(*map(jnp.float32, (3e-3, 0.01, 0.3, 1e-4)))
    batches = (jax.tree.map(lambda a: a[None], repeated_strings(rng)[0]) for _ in itertools.count())
    step = make_train_step(recipe_of(model, TRAIN)).lower(state, next(batches), knobs).compile(OPTIMIZED)
    for batch in itertools.islice(batches, 350):
        state, _ = step(state, batch, knobs)
    batch, repeats = repeated_strings(np.random.default_rng(12345))
    logits, _ = jax.jit(lambda v, b: model.apply(v, b, method="forward"))(
        {"params": state.params, "routing": state.routing}, batch)
    right = np.asarray(logits).argmax(-1) == batch.targets_BT
    assert right[repeats].mean() > 0.9
    assert right[~repeats].mean() < 0.3
