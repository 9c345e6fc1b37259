"""DeepSeek-V2-Lite: 15.7B parameters, 2.4B activated; softmax gate, no selection bias, no query compression, no MTP.

Source: the released configuration, and appendix B of the DeepSeek-V2 report (arXiv 2405.04434) for training: AdamW,
4.2e-4 stepped down by 0.316 after 80% and 90% of 5.7T tokens, 4608 sequences of 4096, balance factor 0.001 (theirs is
the expert-level loss; here it is V3's sequence-wise form). Standard deviation and moment dtype are V3's and ours.
Size: 15,706,484,224 parameters, of which a token activates 2,451,435,008 (head included, embedding not).
For: loading the released weights, and a second shape of the family in tests and planning. YaRN is as released, for
160K; pre-training at 4096 had none: --config.model.attention.yarn=none.
Command: python -m experiments.pretrain --config=configs/deepseek_v2_lite_16b.py --workdir=runs/v2_lite, on a cluster.
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
    YarnConfig,
    constant,
)

TRILLION = 10**12
PEAK, STEP_DOWN = 4.2e-4, 0.316


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=102400, dim=2048, inter_dim=10944, n_layers=27, n_dense_layers=1, norm_eps=1e-6,
            init_std=0.006, dtype="bfloat16", remat="report", scan_unroll=1,
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
            tokenizer="bpe", bpe_vocab_size=100_000, split_rate=0.1, fim_rate=0.0, segment_ids=False,
            eval_bytes=10_000_000, eval_stride=2048, seed=0),
        train=TrainConfig(
            steps=301_997,  # reaches 5.7T tokens: 18,874,368 each
            seq_len=4096, micro_batch_size=128, batch_size=constant(4608), batch_increment=4608,
            warmup_steps=2000,
            learning_rate=(
                Phase(until=0.8 * 5.7 * TRILLION, start=PEAK, end=PEAK, shape="constant"),
                Phase(until=0.9 * 5.7 * TRILLION, start=PEAK * STEP_DOWN, end=PEAK * STEP_DOWN, shape="constant"),
                Phase(until=math.inf, start=PEAK * STEP_DOWN**2, end=PEAK * STEP_DOWN**2, shape="constant")),
            bias_update_speed=constant(0.0),
            mtp_lambda=constant(0.0),
            balance_alpha=0.001,
            optimizer=OptimizerConfig(
                b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_norms=False, clip_norm=1.0, moment_dtype="float32",
                stochastic_rounding=False),
            seed=0, start_from=None, log_every=10, eval_every=1000, checkpoint_every=1000, keep_checkpoints=2,
            numerics_every=None,
            ema=EMAConfig(decay=0.999, every=10),
            guard=GuardConfig(max_bad_steps=5, spike_window=100, spike_deviations=6.0, replica_check_every=100)),
        mesh=MeshConfig(data=1), kernels="auto", quant="bf16")
