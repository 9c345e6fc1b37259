"""Moonlight-16B-A3B (Moonshot AI): V2-Lite's shape with V3's sigmoid gate and selection bias; 16.0B, 2.6B activated.

Source: the released configuration for `model`. `train` is NOT theirs: Moonlight was trained with Muon, and what stands
here are V3's AdamW values of its constant phase as placeholders (a larger model's learning rate and batch).
Size: 15,960,110,208 parameters and biases, of which a token activates 2,579,231,872 (head included, embedding not).
For: loading the released weights, and a shape of the family in tests and planning.
Command: python -m experiments.pretrain --config=configs/moonlight_16b_a3b.py --workdir=runs/moonlight, on a cluster.
"""

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
    SourceConfig,
    TrainConfig,
    constant,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=163840, dim=2048, inter_dim=11264, n_layers=27, n_dense_layers=1, norm_eps=1e-5,
            init_std=0.006, dtype="bfloat16", remat="report", scan_unroll=1,
            attention=AttentionConfig(
                n_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                v_head_dim=128, rope_theta=50000.0, yarn=None, norm_eps=1e-6),
            moe=MoEConfig(
                n_routed_experts=64, n_shared_experts=2, n_activated_experts=6, n_expert_groups=1, n_limited_groups=1,
                moe_inter_dim=1408, score_func="sigmoid", selection_bias=True, norm_topk_prob=True,
                route_scale=2.446),
            mtp=MTPConfig(depth=0, eh_order="embedding_first", hidden="post_norm")),
        data=DataConfig(
            sources=(SourceConfig(files=None, text_field="text", weight=1.0),), validation_fraction=0.001,
            tokenizer="bpe", bpe_vocab_size=163_840, split_rate=0.1, fim_rate=0.1, segment_ids=False,
            eval_bytes=10_000_000, eval_stride=2048, seed=0),
        train=TrainConfig(
            steps=10_000, seq_len=8192, micro_batch_size=128, batch_size=constant(7680), batch_increment=7680,
            warmup_steps=2000, learning_rate=constant(2.2e-4), bias_update_speed=constant(0.001),
            mtp_lambda=constant(0.0), balance_alpha=1e-4,
            optimizer=OptimizerConfig(
                b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_norms=False, clip_norm=1.0,
                moment_dtype="bfloat16", stochastic_rounding=False),
            seed=0, start_from=None, log_every=10, eval_every=1000, checkpoint_every=1000, keep_checkpoints=2,
            numerics_every=None,
            ema=EMAConfig(decay=0.999, every=10),
            guard=GuardConfig(max_bad_steps=5, spike_window=100, spike_deviations=6.0, replica_check_every=100)),
        mesh=MeshConfig(data=1), kernels="auto", quant="bf16")
