"""What training in 8 bits costs in loss: configs/small_moe.py with every recipe, on 100M tokens in the same order.

Source: report section 3.3 and appendices B.1 (below 0.25%) and B.2 (blocks for gradients diverge). The schedules are
those of the 100M tokens in docs/results.md: 1,530 steps of 32 rows of 2,048 tokens, a rate of 8e-4 that falls from 60M
tokens on, a bias that moves ten times as fast as in the report and then slower. Weights are kept at the end only.
`VARIANTS` are read by experiments/ablate.py. "bf16, other order" is bf16 with the sums of a step in another order (two
micro-batches of half the size), with the same weights to begin with and the same rows: the noise to judge by.
The sweep of learning rates is configs/fp8_rates.py, shorter.
Command (four GPUs, four variants at a time; docs/operations.md):
python -m experiments.ablate --config=configs/fp8.py --workdir=runs/fp8 --seeds=0 --jobs=4 --drop_checkpoints \
    --config.data.sources.0.files=CORPUS
Expected time: nine runs of 5 to 8 minutes of an H100. Expected result: docs/numerics.md.
"""

import math
from dataclasses import replace

from configs.small_moe import get_config as small_moe
from dsv3.config import Config, Phase, constant

STEPS, BATCH = 1530, 32

VARIANTS = {
    "bf16": {},
    "bf16, other order": {"train.micro_batch_size": str(BATCH // 2)},
    "fp8": {"quant": "fp8"},
    "fp8_per_tensor": {"quant": "fp8_per_tensor"},
    "fp8_power_of_two": {"quant": "fp8_power_of_two"},
    "fp8_e5m2_gradients": {"quant": "fp8_e5m2_gradients"},
    "fp8_block_gradients": {"quant": "fp8_block_gradients"},
    "fp8_without_e5m6": {"quant": "fp8_without_e5m6"},
    "fp8_direct": {"quant": "fp8_direct"},
}
BASELINES = {name: "bf16" for name in VARIANTS if name != "bf16"}
NOISE = "bf16, other order"


def get_config() -> Config:
    config = small_moe()
    return replace(config, train=replace(
        config.train, steps=STEPS, batch_size=constant(BATCH), warmup_steps=100,
        learning_rate=(
            Phase(until=6e7, start=8e-4, end=8e-4, shape="constant"),
            Phase(until=1.02e8, start=8e-4, end=8e-5, shape="cosine"),
            Phase(until=math.inf, start=8e-5, end=8e-5, shape="constant")),
        bias_update_speed=(
            Phase(until=1e8, start=0.01, end=0.002, shape="linear"),
            Phase(until=math.inf, start=0.0, end=0.0, shape="constant")),
        mtp_lambda=constant(0.3), log_every=10, eval_every=STEPS, checkpoint_every=STEPS, keep_checkpoints=1, ema=None))
