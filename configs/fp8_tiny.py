"""configs/fp8.py at toy size: what 8 bits cost `tiny` in loss, from a common start, on a CPU.

Source: ours. A place to try a recipe of one's own: add it to VARIANTS (dsv3/config/quant.py says what a recipe is).
Command:
python -m experiments.ablate --config=configs/fp8_tiny.py --workdir=runs/fp8_tiny --seeds=0
Expected time: 15 minutes on two CPU cores, most of it fp8. Expected result: docs/numerics.md.
"""

from dataclasses import replace

from configs.tiny import get_config as tiny
from dsv3.config import Config

START = "start"
STEPS = 700

VARIANTS = {
    START: {"train.steps": "400"},
    "base": {},
    "base, other order": {"train.micro_batch_size": "4"},
    "fp8": {"quant": "fp8"},
}
BASELINES = {"base, other order": "base", "fp8": "base"}
NOISE = "base, other order"


def get_config() -> Config:
    config = tiny()
    return replace(config, train=replace(
        config.train, steps=STEPS, eval_every=STEPS, checkpoint_every=STEPS, ema=None))
