"""Train the variants of a config on the same data in the same order and compare them.

python -m experiments.ablate --config=configs/ablation.py --workdir=runs/ablation [--seeds=0,1] [--config.FIELD=VALUE]

The config file lists its `VARIANTS`: name -> overrides. Every variant is trained with every seed (of the weights) in
WORKDIR/VARIANT-SEED; all read WORKDIR/data. Writes WORKDIR/ablation.json and ablation.png, and prints a table. The same
command continues after an interruption.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dsv3.config import UserError, override, require
from dsv3.parallel.distributed import is_main
from dsv3.parallel.ops import make_ops
from dsv3.train.loop import train
from dsv3.train.metrics import read_metrics
from dsv3.train.plots import plot_comparison
from experiments import launch
from experiments.report import ablation_table

CONFIG = flags.DEFINE_string("config", None, "Python file with get_config() and VARIANTS", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of all runs", required=True)
SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "seeds of the initial weights")
LAST = 0.1  # share of the steps, at the end, over which figures are averaged


def share_data(shared: Path, run: Path) -> None:
    """Let `run` read the data prepared in `shared`; whichever run comes first prepares it."""
    run.mkdir(parents=True, exist_ok=True)
    shared.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):  # from an earlier start, or from another process of the job
        (run / "data").symlink_to(shared.resolve(), target_is_directory=True)


def summary(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of one run: losses and the trunk's MaxVio (mean and worst layer) over its last steps, and its validation."""
    steps = [record for record in records if "loss" in record]
    last = steps[-max(1, int(LAST * len(steps))):]
    validation = [record for record in records if "validation_bits_per_byte" in record][-1]
    trunk = len(last[0]["max_vio"]) - len(last[0]["mtp_loss"])
    vio_SL = np.array([record["max_vio"][:trunk] for record in last])
    return {
        "loss": float(np.mean([record["loss"] for record in last])),
        "mtp_loss": float(np.mean([record["mtp_loss"] for record in last])),
        "validation_bits_per_byte": validation["validation_bits_per_byte"],
        "max_vio": float(vio_SL.mean()), "max_vio_worst_layer": float(vio_SL.mean(axis=0).max()),
        "validation_max_vio": float(np.mean(validation["validation_max_vio"][:trunk])),
        "mtp_agreement": validation["validation_mtp_agreement"][0] if validation["validation_mtp_agreement"] else 0.0,
        "tokens": steps[-1]["tokens"],
    }


def main(overrides: Sequence[str]) -> None:
    config, module = launch.load_config(CONFIG.value, overrides), launch.load_module(CONFIG.value)
    require(hasattr(module, "VARIANTS"), f"--config={CONFIG.value} defines no VARIANTS; see configs/ablation.py")
    require(all(seed.isdigit() for seed in SEEDS.value), f"--seeds={','.join(SEEDS.value)} are not whole numbers")
    workdir, bundles, runs = Path(WORKDIR.value), {}, {}
    for seed in SEEDS.value:
        for name, changes in module.VARIANTS.items():
            run = workdir / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
            share_data(workdir / "data", run)
            try:
                variant = override(config, changes | {"train.seed": seed})
                how = variant.kernels, variant.recipe
                train(variant, run, bundles.setdefault(how, make_ops(*how)))
            except UserError as error:
                raise UserError(f"variant {name!r}: {error}") from error
            runs.setdefault(name, []).append(list(read_metrics(run / "metrics.jsonl")))
    if not is_main():
        return
    figures = {name: [summary(records) for records in seeds] for name, seeds in runs.items()}
    (workdir / "ablation.json").write_text(json.dumps(figures, indent=2) + "\n")
    plot_comparison(runs, workdir / "ablation.png")
    print(ablation_table(figures))


if __name__ == "__main__":
    launch.run(main)
