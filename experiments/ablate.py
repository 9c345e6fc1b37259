"""Train the variants of a config on the same data in the same order and compare them.

python -m experiments.ablate --config=configs/ablation.py --workdir=runs/ablation [--seeds=0,1] [--jobs=N]
    [--only=NAME,NAME] [--summary] [--config.FIELD=VALUE]

The config file lists `VARIANTS` (name -> overrides), `BASELINES`, `NOISE` and perhaps `START`, the variant whose end
all others go on from (`experiments/variants.py`). Every variant is trained with every seed (of the weights) in
WORKDIR/VARIANT-SEED; all read WORKDIR/data. Writes ablation.json, ablation.png and curves.json in WORKDIR of all that
there is so far, and prints a table. The same command continues after an interruption, and leaves alone what has
finished or diverged; delete its directory to train it again.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from dsv3.config import Config, UserError, require
from dsv3.data.prepare import prepare
from dsv3.parallel.distributed import is_main
from dsv3.parallel.ops import make_ops
from dsv3.train.diagnosis import Diverged
from dsv3.train.loop import train
from dsv3.train.stopping import Stopped
from experiments import launch
from experiments.children import describe
from experiments.compare import curves, differences, figures, plot_comparison
from experiments.pool import Task, gpus_here, places, run_pool
from experiments.report import ablation_table
from experiments.variants import Comparison, Run, chosen, plan, seeds_of, short

CONFIG = flags.DEFINE_string("config", None, "Python file with get_config(), VARIANTS, BASELINES, NOISE", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of all runs", required=True)
SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "seeds of the initial weights")
ONLY = flags.DEFINE_list("only", None, "train these variants, by the names of their directories; none: only the data")
SUMMARY = flags.DEFINE_bool("summary", False, "train nothing, sum up what there is so far")
JOBS = flags.DEFINE_integer("jobs", None, "train so many variants at a time, a GPU each", lower_bound=1)
DROP = flags.DEFINE_bool("drop_checkpoints", False, "delete the weights of a variant when it has finished")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """One process at a time. The system lets go of the lock when a process ends, however it does."""
    with (workdir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare_once(config: Config, workdir: Path) -> None:
    """Whichever process comes first prepares WORKDIR/data; those that start meanwhile wait for it."""
    with locked(workdir):
        prepare(config.data, config.train.seq_len, workdir / "data")


def train_here(runs: Sequence[Run], start: str | None, workdir: Path) -> None:
    """One after the other. A run that diverges is a result, not the end of the others."""
    bundles = {}
    for run in runs:
        if run.settled():
            continue
        run.check_start()
        run.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # from an earlier start, or from another process of the job
            (run.directory / "data").symlink_to((workdir / "data").resolve(), target_is_directory=True)
        how = run.config.kernels, run.config.recipe
        try:
            train(run.config, run.directory, bundles.setdefault(how, make_ops(*how)))
        except Diverged as diverged:
            print(f"{run.directory.name}: {diverged}", file=sys.stderr)
        except UserError as error:
            raise UserError(f"variant {run.variant!r}: {error}") from error
        else:
            if DROP.value and is_main() and run.variant != start:  # later ones may still go on from it
                shutil.rmtree(run.directory / "checkpoints")


def train_in_jobs(runs: Sequence[Run], start: str | None, workdir: Path, overrides: Sequence[str]) -> bool:
    """In processes of their own, `--jobs` at a time, output in WORKDIR/VARIANT-SEED/log.txt; whether none failed."""
    command = [sys.executable, "-m", "experiments.ablate", f"--config={CONFIG.value}", f"--workdir={workdir}",
               f"--drop_checkpoints={DROP.value}", *(launch.PREFIX + text for text in overrides)]
    stages = [Task("data", [*command, "--only="], workdir / "log.txt")], [], []
    for run in runs:
        if not run.settled():
            run.directory.mkdir(exist_ok=True)
            stages[1 if run.variant == start else 2].append(
                Task(run.directory.name, [*command, f"--seeds={run.seed}", f"--only={short(run.variant)}"],
                     run.directory / "log.txt"))
    where, failed = places(JOBS.value, os.environ, gpus_here()), []
    for some in filter(None, stages) if any(stages[1:]) else ():
        statuses, stopped = run_pool(some, where)
        if stopped:
            raise Stopped("stopped; the same command continues")
        failed += [task for task in some if statuses[task.name]]
        for task in failed:
            last = task.log.read_text("utf-8", "replace").splitlines()[-1:]
            print(f"error: {task.name} {describe(statuses[task.name])}: {''.join(last)} ({task.log})", file=sys.stderr)
        if failed:
            break
    return not failed


def sum_up(runs: Sequence[Run], comparison: Comparison, warmup: int, workdir: Path) -> None:
    """Write and print what there is, draw it without the start, and name what has not finished."""
    found = {name: {} for name in comparison.variants}
    waiting = []
    for run in runs:
        trained = run.trained()
        if trained.steps:
            found[run.variant][run.seed] = trained
        if not (trained.settled and trained.steps):
            step = trained.steps[-1]["step"] if trained.steps else 0
            waiting.append(f"{run.directory.name} (step {step} of {run.config.train.steps})")
    apart = differences(found, comparison.baselines)
    each = lambda what: {name: {seed: what(run, apart.get((name, seed))) for seed, run in seeds.items()}
                         for name, seeds in found.items() if seeds}
    table = each(lambda run, difference: figures(run, difference, warmup))
    drawn = {f"{short(name)}-{seed}": curve for name, seeds in each(curves).items() for seed, curve in seeds.items()}
    if table:
        with locked(workdir):
            (workdir / "ablation.json").write_text(json.dumps(table, indent=2) + "\n")
            (workdir / "curves.json").write_text(json.dumps(drawn) + "\n")
            drawable = {name: seeds for name, seeds in found.items() if seeds and name != comparison.start}
            plot_comparison(drawable or found, apart, comparison.noise, warmup, workdir / "ablation.png")
        print(ablation_table(table))
    if waiting:
        print(f"not finished: {', '.join(waiting)}")


def main(overrides: Sequence[str]) -> None:
    config = launch.load_config(CONFIG.value, overrides)
    comparison = Comparison.of(launch.load_module(CONFIG.value), CONFIG.value)
    require(all(seed.isdigit() for seed in SEEDS.value), f"--seeds={','.join(SEEDS.value)} are not whole numbers")
    workdir = Path(WORKDIR.value)
    todo = chosen(plan(config, comparison, workdir, SEEDS.value), ONLY.value)
    whole = True
    if not SUMMARY.value:
        workdir.mkdir(parents=True, exist_ok=True)
        if JOBS.value is not None and todo:
            whole = train_in_jobs(todo, comparison.start, workdir, overrides)
        else:
            if is_main():
                prepare_once(config, workdir)
            train_here(todo, comparison.start, workdir)
    if SUMMARY.value or JOBS.value is not None or is_main():  # the first two leave the GPU to others
        runs = plan(config, comparison, workdir, seeds_of(comparison, workdir, SEEDS.value))
        sum_up(runs, comparison, config.train.warmup_steps, workdir)
    if not whole:
        sys.exit(1)


if __name__ == "__main__":
    launch.run(main)
