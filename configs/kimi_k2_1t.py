"""Kimi-K2 (Moonshot AI): V3's code path with 384 experts in one group and 64 heads; 1.03T parameters, 32B activated.

Source: the released configuration (0711) for `model`; YaRN as released, for 128K. `train` is NOT theirs: Kimi-K2 was
trained with MuonClip, and what stands here are V3's AdamW values of its constant phase as placeholders.
Size: 1,026,408,232,448 parameters and biases, of which a token activates 31,687,095,808 (head included, embedding not).
The Kimi-K2 report says 1.04T, 1.3% more than its configuration gives.
For: loading the released weights, and the largest shape of the family in planning.
Command: python -m experiments.pretrain --config=configs/kimi_k2_1t.py --workdir=runs/kimi_k2, on a cluster.
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
    YarnConfig,
    constant,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=163840, dim=7168, inter_dim=18432, n_layers=61, n_dense_layers=1, norm_eps=1e-6,
            init_std=0.006, dtype="bfloat16", remat="report", scan_unroll=1,
            attention=AttentionConfig(
                n_heads=64, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                v_head_dim=128, rope_theta=50000.0,
                yarn=YarnConfig(
                    factor=32.0, original_seq_len=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
                norm_eps=1e-6),
            moe=MoEConfig(
                n_routed_experts=384, n_shared_experts=1, n_activated_experts=8, n_expert_groups=1, n_limited_groups=1,
                moe_inter_dim=2048, score_func="sigmoid", selection_bias=True, norm_topk_prob=True,
                route_scale=2.827),
            mtp=MTPConfig(depth=0, eh_order="embedding_first", hidden="post_norm")),
        data=DataConfig(
            sources=(SourceConfig(files=None, text_field="text", weight=1.0),), validation_fraction=0.001,
            tokenizer="bpe", bpe_vocab_size=163_840, split_rate=0.1, fim_rate=0.1, segment_ids=False,
            eval_bytes=10_000_000, eval_stride=2048, seed=0),
        train=TrainConfig(
            steps=10_000, seq_len=4096, micro_batch_size=128, batch_size=constant(15360), batch_increment=15360,
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
