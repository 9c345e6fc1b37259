"""What training in 8 bits costs in loss: configs/small_moe.py with every recipe, 100M tokens each from a common start.

Source: report section 3.3 and appendices B.1 (below 0.25%) and B.2 (blocks for gradients diverge). All runs go on from
the end of "start" (bf16, 45.9M tokens), because the first tokens are no measure: there two bf16 runs that differ in
rounding alone come to differ by several percent (configs/fp8_from_scratch.py, docs/numerics.md). From there every run
reads the same 100.3M tokens in the same order: a rate of 8e-4 that falls over the last 40M of them, a bias that moves
ten times as fast as in the report and then slower. Weights are kept at the end only.
`VARIANTS` are read by experiments/ablate.py. "bf16, other order" is bf16 with the sums of a step in another order (two
micro-batches of half the size): the noise to judge by. Recipes that change one thing in "fp8" are compared over the
first 612 of the 1,530 steps (40.1M tokens), all at the highest rate; "rate x 2" are the first 306 at twice that rate,
so that no recipe is judged at one lucky setting.
Command (four GPUs, four variants at a time; docs/operations.md):
python -m experiments.ablate --config=configs/fp8.py --workdir=runs/fp8 --seeds=0 --jobs=4 --drop_checkpoints \
    --config.data.sources.0.files=CORPUS
Expected time: four runs of 4 to 8 minutes of an H100, six of 3, four of 2. Expected result: docs/numerics.md.
"""

import math
from dataclasses import replace

from configs.small_moe import get_config as small_moe
from dsv3.config import Config, Phase, constant

START, START_STEPS = "start", 700
STEPS, BATCH, RATE = START_STEPS + 1530, 32, 8e-4
BEFORE = START_STEPS * BATCH * 2048  # tokens


def first(steps: int) -> dict[str, str]:
    """Overrides for so many steps after the start."""
    return {"train.steps": str(START_STEPS + steps)}


def at(factor: float) -> dict[str, str]:
    """Overrides for a short run with the learning rate multiplied."""
    rates = {f"train.learning_rate.0.{end}": str(factor * RATE) for end in ("start", "end")}
    return rates | {"train.learning_rate.1.start": str(factor * RATE)} | first(306)


VARIANTS = {
    START: first(0),
    "bf16": {},
    "bf16, other order": {"train.micro_batch_size": str(BATCH // 2)},
    "fp8": {"quant": "fp8"},
    **{f"fp8_{what}": {"quant": f"fp8_{what}"} | first(612) for what in (
        "per_tensor", "power_of_two", "e5m2_gradients", "block_gradients", "without_e5m6", "direct")},
    **{f"{quant}, rate x {factor}": {"quant": quant} | at(factor) for factor in (0.5, 2) for quant in ("bf16", "fp8")},
}
BASELINES = {name: "bf16" for name in VARIANTS if name not in (START, "bf16") and "rate" not in name}
BASELINES |= {f"fp8, rate x {factor}": f"bf16, rate x {factor}" for factor in (0.5, 2)}
NOISE = "bf16, other order"


def get_config() -> Config:
    config = small_moe()
    return replace(config, train=replace(
        config.train, steps=STEPS, batch_size=constant(BATCH), warmup_steps=100,
        learning_rate=(
            Phase(until=BEFORE + 6e7, start=RATE, end=RATE, shape="constant"),
            Phase(until=BEFORE + 1.02e8, start=RATE, end=RATE / 10, shape="cosine"),
            Phase(until=math.inf, start=RATE / 10, end=RATE / 10, shape="constant")),
        bias_update_speed=(
            Phase(until=BEFORE + 1e8, start=0.01, end=0.002, shape="linear"),
            Phase(until=math.inf, start=0.0, end=0.0, shape="constant")),
        mtp_lambda=constant(0.3), log_every=10, eval_every=STEPS, checkpoint_every=STEPS, keep_checkpoints=1, ema=None))
