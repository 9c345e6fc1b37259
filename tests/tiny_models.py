"""Models small enough to check by hand, in every shape of the family, and inputs for them."""

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import (
    AttentionConfig,
    GuardConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    TrainConfig,
    YarnConfig,
    constant,
)
from dsv3.model.batch import Batch
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import make_mesh
from dsv3.train.optimizer import adamw
from dsv3.train.step import BadSteps, Recipe, TrainState, make_recipe

YARN = YarnConfig(factor=40.0, original_seq_len=16, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)


def model_config(attention: dict = {}, moe: dict = {}, mtp: dict = {}, **changes) -> ModelConfig:
    """A V3 in miniature (two dense and three MoE layers are too many: one and two), with fields changed."""
    defaults = dict(
        vocab_size=61, dim=24, inter_dim=40, n_layers=3, n_dense_layers=1, norm_eps=1e-6, init_std=0.2,
        dtype="float32", remat="none", scan_unroll=1,
        attention=AttentionConfig(**dict(
            n_heads=3, q_lora_rank=14, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5,
            rope_theta=100.0, yarn=None, norm_eps=1e-6) | attention),
        moe=MoEConfig(**dict(
            n_routed_experts=8, n_shared_experts=1, n_activated_experts=3, n_expert_groups=4, n_limited_groups=2,
            moe_inter_dim=12, score_func="sigmoid", selection_bias=True, norm_topk_prob=True, route_scale=2.5) | moe),
        mtp=MTPConfig(**dict(depth=1, eh_order="embedding_first", hidden="post_norm") | mtp))
    return ModelConfig(**(defaults | changes))


def train_config(optimizer: dict = {}, guard: dict = {}, **changes) -> TrainConfig:
    """Two rows of 12 tokens a step, float32 moments."""
    defaults = dict(
        steps=1, seq_len=12, micro_batch_size=2, batch_size=constant(2), batch_increment=2, warmup_steps=0,
        learning_rate=constant(1e-2), bias_update_speed=constant(0.01), mtp_lambda=constant(0.3), balance_alpha=1e-2,
        optimizer=OptimizerConfig(**dict(
            b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_norms=False, clip_norm=1.0, moment_dtype="float32",
            stochastic_rounding=False) | optimizer),
        seed=0, start_from=None, log_every=1, eval_every=1, checkpoint_every=1, keep_checkpoints=1, numerics_every=None,
        ema=None,
        guard=GuardConfig(**dict(
            max_bad_steps=3, spike_window=10, spike_deviations=6.0, replica_check_every=1) | guard))
    return TrainConfig(**(defaults | changes))


def mesh_of(n_devices: int = 1):
    return make_mesh(MeshConfig(data=n_devices))


def recipe_of(model, train: TrainConfig, n_devices: int = 1) -> Recipe:
    return make_recipe(model, train, False, mesh_of(n_devices))


def train_state(variables: dict, train: TrainConfig) -> TrainState:
    """Step 0 from given variables."""
    params = variables["params"]
    bad_steps = BadSteps(jnp.int32(0), jnp.int32(0))  # two buffers: the step donates each
    return TrainState(jnp.int32(0), params, variables["routing"], adamw(train.optimizer).init(params), bad_steps)


V2 = dict(score_func="softmax", selection_bias=False, norm_topk_prob=False, n_shared_experts=2)

FAMILY = {
    "v3": model_config(),
    "v3_yarn": model_config(attention=dict(yarn=YARN)),
    "yarn_unequal_mscale": model_config(attention=dict(yarn=dataclasses.replace(YARN, mscale_all_dim=0.707))),
    "no_query_compression": model_config(attention=dict(q_lora_rank=None)),
    "one_group": model_config(norm_eps=1e-2, moe=dict(n_expert_groups=1, n_limited_groups=1, route_scale=2.446)),
    "v2_greedy": model_config(
        attention=dict(q_lora_rank=None), mtp=dict(depth=0),
        moe=V2 | dict(n_expert_groups=1, n_limited_groups=1, route_scale=1.0)),
    "v2_groups": model_config(moe=V2 | dict(route_scale=16.0)),
    "no_shared_expert": model_config(moe=dict(n_shared_experts=0)),
    "all_dense_trunk": model_config(n_dense_layers=3),
    "no_dense_layer": model_config(n_dense_layers=0, n_layers=2),
    "mtp_depth_two": model_config(mtp=dict(depth=2)),
    "mtp_hidden_first_pre_norm": model_config(mtp=dict(depth=2, eh_order="hidden_first", hidden="pre_norm")),
}


def transformer(config: ModelConfig) -> Transformer:
    return Transformer(config, reference_ops(row_block=4, loss_chunk=8))


@cache
def variable_shapes(config: ModelConfig) -> dict:
    """Of a model's variables: traced once, as many tests draw variables of one model."""
    return nn.unbox(jax.eval_shape(transformer(config).init, jax.random.key(0), random_batch(config)))


def random_variables(config: ModelConfig, seed: int = 0) -> dict:
    """Variables drawn with NumPy (nothing to compile), norm gains and selection biases away from trivial values."""
    leaves, tree = jax.tree.flatten_with_path(variable_shapes(config))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = path[-1].key, rng.standard_normal(leaf.shape)
        if name.endswith("norm"):
            value = 1 + 0.3 * noise
        elif name == "bias":
            value = 0.4 * noise - 0.5
        else:
            value = config.init_std * noise
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.unflatten(tree, [draw(path, leaf) for path, leaf in leaves])


def random_batch(config: ModelConfig, batch: int = 2, length: int = 12, seed: int = 1) -> Batch:
    """Two rows: several segments each, the second with padding at its end."""
    rng = np.random.default_rng(seed)
    row = rng.integers(0, config.vocab_size, (batch, length + 1)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1).astype(np.int32)
    segments[-1, length - 3:] = 0
    weights = (segments > 0).astype(np.float32)
    weights[:, 3] = 0
    return Batch(*map(jnp.asarray, (row[:, :-1], row[:, 1:], weights, segments)))


def distance(actual, expected) -> float:
    """|actual - expected| / |expected|, as norms over all elements."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
