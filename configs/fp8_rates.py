"""bf16 and FP8 at three learning rates, so that no recipe is judged at one lucky setting: a third of configs/fp8.py.

Source: ours. 510 steps (33.4M tokens) with schedules of that length; each rate of fp8 is compared with that of bf16.
Command (four GPUs; reads what was prepared for configs/fp8.py, if that is linked to it first):
mkdir -p runs/fp8_rates && ln -s ../fp8/data runs/fp8_rates/data
python -m experiments.ablate --config=configs/fp8_rates.py --workdir=runs/fp8_rates --seeds=0 --jobs=4 \
    --drop_checkpoints --config.data.sources.0.files=CORPUS
Expected time: six runs of 2 to 3 minutes of an H100. Expected result: docs/numerics.md.
"""

import math
from dataclasses import replace

from configs.fp8 import get_config as fp8
from dsv3.config import Config, Phase

STEPS = 510
RATE = 8e-4


def at(factor: float) -> dict[str, str]:
    """Overrides that multiply the learning rate."""
    high, low = str(factor * RATE), str(factor * RATE / 10)
    starts = {"0.start": high, "0.end": high, "1.start": high, "1.end": low, "2.start": low, "2.end": low}
    return {f"train.learning_rate.{name}": value for name, value in starts.items()}


VARIANTS = {f"{quant}, rate x {factor}": {"quant": quant} | at(factor)
            for factor in (0.5, 1, 2) for quant in ("bf16", "fp8")}
BASELINES = {name: name.replace("fp8", "bf16") for name in VARIANTS if name.startswith("fp8")}
NOISE = None


def get_config() -> Config:
    config = fp8()
    return replace(config, train=replace(
        config.train, steps=STEPS, eval_every=STEPS, checkpoint_every=STEPS,
        learning_rate=(
            Phase(until=2e7, start=RATE, end=RATE, shape="constant"),
            Phase(until=3.4e7, start=RATE, end=RATE / 10, shape="cosine"),
            Phase(until=math.inf, start=RATE / 10, end=RATE / 10, shape="constant")),
        bias_update_speed=(
            Phase(until=3.3e7, start=0.01, end=0.002, shape="linear"),
            Phase(until=math.inf, start=0.0, end=0.0, shape="constant"))))
