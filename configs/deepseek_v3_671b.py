"""DeepSeek-V3's pre-training run: 671B parameters, 37B activated, 14.8T tokens at a length of 4096.

Source: report sections 4.1 and 4.2. Not stated there, so ours: epsilon, no decay of norm gains, a batch ramp that is
linear in tokens, in increments of 768 sequences.
Size: 671,026,419,200 parameters and biases, of which a token activates 36,625,618,432 (head included, embedding not);
the MTP module adds 11,610,068,224.
For: planning, shape checks and a recipe to derive from; the report's run took 2048 H800 GPUs and 2.664M GPU hours.
Command: python -m experiments.pretrain --config=configs/deepseek_v3_671b.py --workdir=runs/v3, on a cluster.
The corpus was not published: give yours with --config.data.sources.0.files=CORPUS. The tokenizer is the released one,
for which the 129,280 rows of the embedding are meant. The share of split tokens is ours (docs/data.md).
Long context (YaRN, section 4.3) comes after this run.
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
)

BILLION, TRILLION = 10**9, 10**12


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=129280, dim=7168, inter_dim=18432, n_layers=61, n_dense_layers=3, norm_eps=1e-6,
            init_std=0.006, dtype="bfloat16", remat="report", scan_unroll=1,
            attention=AttentionConfig(
                n_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                v_head_dim=128, rope_theta=10000.0, yarn=None, norm_eps=1e-6),
            moe=MoEConfig(
                n_routed_experts=256, n_shared_experts=1, n_activated_experts=8, n_expert_groups=8,
                n_limited_groups=4, moe_inter_dim=2048, score_func="sigmoid", selection_bias=True,
                norm_topk_prob=True, route_scale=2.5),
            mtp=MTPConfig(depth=1, eh_order="embedding_first", hidden="post_norm")),
        data=DataConfig(
            sources=(SourceConfig(files=None, text_field="text", weight=1.0),), validation_fraction=0.001,
            tokenizer="deepseek_v3", bpe_vocab_size=128_000, split_rate=0.1, fim_rate=0.1, segment_ids=False,
            eval_bytes=10_000_000, eval_stride=2048, seed=0),
        train=TrainConfig(
            steps=243_761,  # reaches 14.8T tokens: 15,976 steps of the ramp, then 62,914,560 tokens each
            seq_len=4096, micro_batch_size=128, batch_increment=768,
            batch_size=(
                Phase(until=469 * BILLION, start=3072, end=15360, shape="linear"),
                Phase(until=math.inf, start=15360, end=15360, shape="constant")),
            warmup_steps=2000,
            learning_rate=(
                Phase(until=10 * TRILLION, start=2.2e-4, end=2.2e-4, shape="constant"),
                Phase(until=14_300 * BILLION, start=2.2e-4, end=2.2e-5, shape="cosine"),
                Phase(until=14_633 * BILLION, start=2.2e-5, end=2.2e-5, shape="constant"),
                Phase(until=math.inf, start=7.3e-6, end=7.3e-6, shape="constant")),
            bias_update_speed=(
                Phase(until=14_300 * BILLION, start=0.001, end=0.001, shape="constant"),
                Phase(until=math.inf, start=0.0, end=0.0, shape="constant")),
            mtp_lambda=(
                Phase(until=10 * TRILLION, start=0.3, end=0.3, shape="constant"),
                Phase(until=math.inf, start=0.1, end=0.1, shape="constant")),
            balance_alpha=1e-4,
            optimizer=OptimizerConfig(
                b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_norms=False, clip_norm=1.0,
                moment_dtype="bfloat16", stochastic_rounding=False),
            seed=0, start_from=None, log_every=10, eval_every=1000, checkpoint_every=1000, keep_checkpoints=2,
            numerics_every=None,
            ema=EMAConfig(decay=0.999, every=10),
            guard=GuardConfig(max_bad_steps=5, spike_window=100, spike_deviations=6.0, replica_check_every=100)),
        mesh=MeshConfig(data=1), kernels="auto", quant="bf16")
