"""configs/fp8.py from the first token on: 100M tokens from new weights, with the schedules of docs/results.md.

Source: report section 3.3 and appendix B.1. 1,530 steps of 32 rows of 2,048 tokens. What it shows is mostly how far
apart two runs in the same format come to lie (docs/numerics.md), which is why configs/fp8.py begins later.
Command (four GPUs):
python -m experiments.ablate --config=configs/fp8_from_scratch.py --workdir=runs/fp8_from_scratch --seeds=0 --jobs=4 \
    --drop_checkpoints --config.data.sources.0.files=CORPUS
Expected time: four runs of 7 minutes of an H200. Expected result: docs/numerics.md.
"""

import math
from dataclasses import replace

from configs import fp8
from dsv3.config import Config, Phase

STEPS = 1530

VARIANTS = {name: fp8.VARIANTS[name] for name in ("bf16", "bf16, other order", "fp8", "fp8_power_of_two")}
BASELINES = {name: "bf16" for name in VARIANTS if name != "bf16"}
NOISE = fp8.NOISE


def get_config() -> Config:
    config = fp8.get_config()
    return replace(config, train=replace(
        config.train, steps=STEPS, eval_every=STEPS, checkpoint_every=STEPS,
        learning_rate=(
            Phase(until=6e7, start=fp8.RATE, end=fp8.RATE, shape="constant"),
            Phase(until=1.02e8, start=fp8.RATE, end=fp8.RATE / 10, shape="cosine"),
            Phase(until=math.inf, start=fp8.RATE / 10, end=fp8.RATE / 10, shape="constant")),
        bias_update_speed=(
            Phase(until=1e8, start=0.01, end=0.002, shape="linear"),
            Phase(until=math.inf, start=0.0, end=0.0, shape="constant"))))
