"""What a run of imported weights has beside its model: how it would read text and train on.

Source: ours, cautious values for continuing on released weights: a fiftieth of V3's learning rate, constant after a
warm-up; V3's optimizer, bias speed and balance factor at the end of its pre-training (report section 4.2).
`model` is replaced by what the checkpoint's config.json says; the one here is DeepSeek-V2-Lite's.
`train.seq_len` is also the length of the cache that generation takes unless told otherwise.
Command: python -m experiments.convert import --hf=DIR --workdir=RUN [--config=configs/imported.py]
"""

from dsv3.config import (
    AttentionConfig,
    Config,
    DataConfig,
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
            vocab_size=102400, dim=2048, inter_dim=10944, n_layers=27, n_dense_layers=1, norm_eps=1e-6,
            init_std=0.02, dtype="bfloat16", remat="report", scan_unroll=1,
            attention=AttentionConfig(
                n_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                v_head_dim=128, rope_theta=10000.0,
                yarn=YarnConfig(
                    factor=40.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0, mscale=0.707,
                    mscale_all_dim=0.707),
                norm_eps=1e-6),
            moe=MoEConfig(
                n_routed_experts=64, n_shared_experts=2, n_activated_experts=6, n_expert_groups=1, n_limited_groups=1,
                moe_inter_dim=1408, score_func="softmax", selection_bias=False, norm_topk_prob=False,
                route_scale=1.0),
            mtp=MTPConfig(depth=0, eh_order="embedding_first", hidden="post_norm")),
        data=DataConfig(
            sources=(SourceConfig(files=None, text_field="text", weight=1.0),), validation_fraction=0.001,
            tokenizer="bytes", bpe_vocab_size=1024, split_rate=0.0, fim_rate=0.0, segment_ids=False,
            eval_bytes=1_000_000, eval_stride=1024, seed=0),
        train=TrainConfig(
            steps=1000, seq_len=2048, micro_batch_size=1, batch_size=constant(32), batch_increment=32,
            warmup_steps=100, learning_rate=constant(4.4e-6), bias_update_speed=constant(0.0),
            mtp_lambda=constant(0.1), balance_alpha=1e-4,
            optimizer=OptimizerConfig(
                b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_norms=False, clip_norm=1.0,
                moment_dtype="bfloat16", stochastic_rounding=False),
            seed=0, start_from=None, log_every=10, eval_every=500, checkpoint_every=500, keep_checkpoints=2,
            numerics_every=None, ema=None,
            guard=GuardConfig(max_bad_steps=5, spike_window=100, spike_deviations=6.0, replica_check_every=100)),
        mesh=MeshConfig(data=1), kernels="auto", quant="bf16")
