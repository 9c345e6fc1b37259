"""What the report claims for bias balancing and for multi-token prediction, at a size where a run takes a minute.

Source: report sections 4.5.1 and 4.5.2 (tables 4 and 5); ours in every size. 64 experts of which 8 are active, as in
configs/small_moe.py, whose data this shares; 120M parameters, 20M tokens. `VARIANTS` are read by experiments/ablate.py.
The bias moves ten times as fast as in the report: 600 steps of 0.001 would end before it has done its work. With a
lambda of zero no gradient of the MTP module reaches the model: the module learns nothing and the model is one without.
Command:
python -m experiments.ablate --config=configs/ablation.py --workdir=runs/ablation --config.data.sources.0.files=CORPUS
Expected time and result: docs/results.md.
"""

import math

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
    Phase,
    SourceConfig,
    TrainConfig,
    constant,
)

STEPS, BATCH, LENGTH = 600, 16, 2048
TOKENS = STEPS * BATCH * LENGTH

VARIANTS = {
    "bias": {},
    "auxiliary loss 0.01": {"train.bias_update_speed.0.start": "0", "train.bias_update_speed.0.end": "0",
                            "train.balance_alpha": "0.01"},
    "auxiliary loss 0.001": {"train.bias_update_speed.0.start": "0", "train.bias_update_speed.0.end": "0",
                             "train.balance_alpha": "0.001"},
    "no balancing": {"train.bias_update_speed.0.start": "0", "train.bias_update_speed.0.end": "0",
                     "train.balance_alpha": "0"},
    "bias, no MTP": {"train.mtp_lambda.0.start": "0", "train.mtp_lambda.0.end": "0"},
}
BASELINES = {name: "bias" for name in VARIANTS if name != "bias"}
NOISE = None


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=16384, dim=512, inter_dim=1536, n_layers=6, n_dense_layers=1, norm_eps=1e-6, init_std=0.02,
            dtype="bfloat16", remat="none", scan_unroll=5,
            attention=AttentionConfig(
                n_heads=4, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                rope_theta=10000.0, yarn=None, norm_eps=1e-6),
            moe=MoEConfig(
                n_routed_experts=64, n_shared_experts=1, n_activated_experts=8, n_expert_groups=8, n_limited_groups=4,
                moe_inter_dim=256, score_func="sigmoid", selection_bias=True, norm_topk_prob=True, route_scale=2.5),
            mtp=MTPConfig(depth=1, eh_order="embedding_first", hidden="post_norm")),
        data=DataConfig(
            sources=(SourceConfig(files=None, text_field="text", weight=1.0),), validation_fraction=0.01,
            tokenizer="bpe", bpe_vocab_size=16384, split_rate=0.1, fim_rate=0.1, segment_ids=False,
            eval_bytes=2_000_000, eval_stride=1024, seed=0),
        train=TrainConfig(
            steps=STEPS, seq_len=LENGTH, micro_batch_size=BATCH, batch_size=constant(BATCH), batch_increment=BATCH,
            warmup_steps=100,
            learning_rate=(
                Phase(until=0.6 * TOKENS, start=1e-3, end=1e-3, shape="constant"),
                Phase(until=TOKENS, start=1e-3, end=1e-4, shape="cosine"),
                Phase(until=math.inf, start=1e-4, end=1e-4, shape="constant")),
            bias_update_speed=constant(0.01), mtp_lambda=constant(0.3), balance_alpha=1e-4,
            optimizer=OptimizerConfig(
                b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_norms=False, clip_norm=1.0,
                moment_dtype="bfloat16", stochastic_rounding=False),
            seed=0, start_from=None, log_every=50, eval_every=STEPS, checkpoint_every=STEPS, keep_checkpoints=1,
            numerics_every=None, ema=None,
            guard=GuardConfig(max_bad_steps=5, spike_window=100, spike_deviations=6.0, replica_check_every=100)),
        mesh=MeshConfig(data=1), kernels="auto", quant="bf16")
