"""A DeepSeek-V3 of 1.0B parameters, 0.2B of them activated, for one H100 in bfloat16.

Source: ours; the report's recipe (section 4.2), its 14.8T tokens mapped to 3.9B and its rates scaled to this width.
V3's own head sizes, expert groups and 9 active experts; widths that are multiples of 128, as tensor cores want them.
Size: 984,297,152 parameters and biases, of which a token activates 192,622,272 (head included, embedding not); the
MTP module adds 134,847,552. Training state: float32 masters and gradients with bfloat16 moments, 13 GB.
Command:
python -m experiments.pretrain --config=configs/small_moe.py --workdir=runs/small --config.data.sources.0.files=CORPUS
CORPUS is files, directories or globs, with commas between them (docs/data.md): the standard library, which `files=None`
reads, is far too small for 3.9B tokens.
Expected time: a token costs 1.57 GFLOP. Training ran at 224,000 tokens/s on an H100 (36% of its peak, 60 GiB): 5 hours.
Expected result: of all 3.9B tokens not measured; 100M tokens of code give 0.719 bits per byte (docs/results.md).
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

STEPS, BATCH, LENGTH = 30_000, 64, 2048
TOKENS = STEPS * BATCH * LENGTH


def of_report(trillions: float) -> float:
    """The token of this run that lies as far along as `trillions` does in the report's 14.8T."""
    return TOKENS * trillions / 14.8


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=16384, dim=1280, inter_dim=4608, n_layers=8, n_dense_layers=1, norm_eps=1e-6, init_std=0.006,
            dtype="bfloat16", remat="report", scan_unroll=7,
            attention=AttentionConfig(
                n_heads=8, q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                rope_theta=10000.0, yarn=None, norm_eps=1e-6),
            moe=MoEConfig(
                n_routed_experts=64, n_shared_experts=1, n_activated_experts=8, n_expert_groups=8, n_limited_groups=4,
                moe_inter_dim=512, score_func="sigmoid", selection_bias=True, norm_topk_prob=True, route_scale=2.5),
            mtp=MTPConfig(depth=1, eh_order="embedding_first", hidden="post_norm")),
        data=DataConfig(
            sources=(SourceConfig(files=None, text_field="text", weight=1.0),), validation_fraction=0.01,
            tokenizer="bpe", bpe_vocab_size=16384, split_rate=0.1, fim_rate=0.1, segment_ids=False,
            eval_bytes=2_000_000, eval_stride=1024, seed=0),
        train=TrainConfig(
            steps=STEPS, seq_len=LENGTH, micro_batch_size=32, batch_increment=32,
            batch_size=(
                Phase(until=of_report(0.469), start=BATCH // 2, end=BATCH, shape="linear"),
                Phase(until=math.inf, start=BATCH, end=BATCH, shape="constant")),
            warmup_steps=1000,
            learning_rate=(
                Phase(until=of_report(10.0), start=8e-4, end=8e-4, shape="constant"),
                Phase(until=of_report(14.3), start=8e-4, end=8e-5, shape="cosine"),
                Phase(until=of_report(14.633), start=8e-5, end=8e-5, shape="constant"),
                Phase(until=math.inf, start=2.7e-5, end=2.7e-5, shape="constant")),
            bias_update_speed=(
                Phase(until=of_report(14.3), start=1e-3, end=1e-3, shape="constant"),
                Phase(until=math.inf, start=0.0, end=0.0, shape="constant")),
            mtp_lambda=(
                Phase(until=of_report(10.0), start=0.3, end=0.3, shape="constant"),
                Phase(until=math.inf, start=0.1, end=0.1, shape="constant")),
            balance_alpha=1e-4,
            optimizer=OptimizerConfig(
                b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_norms=False, clip_norm=1.0,
                moment_dtype="bfloat16", stochastic_rounding=False),
            seed=0, start_from=None, log_every=20, eval_every=1000, checkpoint_every=1000, keep_checkpoints=2,
            numerics_every=None,
            ema=EMAConfig(decay=0.9, every=100),
            guard=GuardConfig(max_bad_steps=5, spike_window=100, spike_deviations=6.0, replica_check_every=100)),
        mesh=MeshConfig(data=1), kernels="auto", quant="bf16")
