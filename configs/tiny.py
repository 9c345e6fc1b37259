"""A small but complete DeepSeek-V3 that learns Python from the standard library, on two CPU cores in minutes.

Source: ours; shapes chosen for a laptop. Every part of the report is on: query compression, node-limited routing over
groups, bias balancing, a sequence-wise balance loss, one MTP module, FIM, bfloat16 moments.
The schedules are tables over consumed tokens, laid out for STEPS: a run cut short with --config.train.steps does not
reach their end. To train longer or shorter, change STEPS.
Expected: 1.71 bits per byte after 4 minutes (README.md, "Results").
Command: make train, or python -m experiments.pretrain --config=configs/tiny.py --workdir=runs/tiny
"""

import math

from dsv3.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EMAConfig,
    GuardConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    Phase,
    SourceConfig,
    TrainConfig,
    constant,
)

STEPS, BATCH, LENGTH = 600, 8, 256
TOKENS = STEPS * BATCH * LENGTH


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=2048, dim=192, inter_dim=512, n_layers=4, n_dense_layers=1, norm_eps=1e-6, init_std=0.02,
            dtype="float32", remat="report", scan_unroll=1,
            attention=AttentionConfig(
                n_heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
                rope_theta=10000.0, yarn=None, norm_eps=1e-6),
            moe=MoEConfig(
                n_routed_experts=8, n_shared_experts=1, n_activated_experts=2, n_expert_groups=4, n_limited_groups=2,
                moe_inter_dim=128, score_func="sigmoid", selection_bias=True, norm_topk_prob=True, route_scale=1.0),
            mtp=MTPConfig(depth=1, eh_order="embedding_first", hidden="post_norm")),
        data=DataConfig(
            sources=(SourceConfig(files=None, text_field="text", weight=1.0),), validation_fraction=0.05,
            tokenizer="bpe", bpe_vocab_size=2048, split_rate=0.0, fim_rate=0.1, segment_ids=False,
            eval_bytes=200_000, eval_stride=128, seed=0),
        train=TrainConfig(
            steps=STEPS, seq_len=LENGTH, micro_batch_size=BATCH, batch_size=constant(BATCH), batch_increment=BATCH,
            warmup_steps=40,
            learning_rate=(
                Phase(until=0.3 * TOKENS, start=3e-3, end=3e-3, shape="constant"),
                Phase(until=TOKENS, start=3e-3, end=3e-4, shape="cosine"),
                Phase(until=math.inf, start=3e-4, end=3e-4, shape="constant")),
            bias_update_speed=(  # the report's 0.001 moves too slowly for a run this short
                Phase(until=0.6 * TOKENS, start=0.01, end=0.01, shape="constant"),
                Phase(until=TOKENS, start=0.01, end=0.001, shape="cosine"),
                Phase(until=math.inf, start=0.001, end=0.001, shape="constant")),
            mtp_lambda=constant(0.3),
            balance_alpha=1e-4,
            optimizer=OptimizerConfig(
                b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_norms=False, clip_norm=1.0,
                moment_dtype="bfloat16", stochastic_rounding=False),
            seed=0, start_from=None, log_every=20, eval_every=200, checkpoint_every=200, keep_checkpoints=2,
            numerics_every=None,
            ema=EMAConfig(decay=0.95, every=5),
            guard=GuardConfig(max_bad_steps=5, spike_window=100, spike_deviations=6.0, replica_check_every=100)),
        mesh=MeshConfig(data=1), kernels="auto", quant="bf16")
