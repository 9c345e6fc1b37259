"""What separates runs of one config: figures of each, and its loss relative to that of a baseline of the same seed.

`metrics.jsonl` has a line a step, whatever `train.log_every` is: losses l_t are those of single steps, over the same
rows in all variants. Smoothed by an EMA of 0.9 over steps, corrected for its start (`dsv3/train/plots.py:smoothed`), a
variant v differs from its baseline b at step t by

    d_t = (ema(l_v)_t - ema(l_b)_t) / ema(l_b)_t        in percent

t counts from the first step of the two, which is not step 1 where both go on from another run (`train.start_from`).
Two variants that compute the same in another order of sums are the noise to judge the others by.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dsv3.config import TrainConfig, require
from dsv3.train.metrics import read_metrics
from dsv3.train.plots import smoothed

LAST = 0.1  # share of the steps, at the end, over which figures are averaged
CURVE = 10  # steps that a point of a curve is the mean of


class Trained(NamedTuple):
    """What a run has come to: records of its steps, its validation after the last (None before it), and the first of
    the bad steps in a row with which it ended, if it did (None)."""

    steps: list[dict[str, Any]]
    validation: dict[str, Any] | None
    diverged: int | None

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to train."""
        return self.validation is not None or self.diverged is not None

    def first(self) -> int:
        """Number of the first step."""
        return self.steps[0]["step"]

    def good(self) -> int:
        """How many steps came before the first of the bad ones with which it ended."""
        return len(self.steps) if self.diverged is None else self.diverged - self.first()

    def after(self, warmup: int) -> slice:
        """Its steps after the first `warmup` ones of all training."""
        return slice(max(0, warmup + 1 - self.first()), None)

    def loss(self) -> np.ndarray:
        """Of every step."""
        return np.array([record["loss"] for record in self.steps])

    def max_vio(self) -> np.ndarray:
        """Of every step and MoE layer of the trunk, [S, L]."""
        trunk = len(self.steps[0]["max_vio"]) - len(self.steps[0]["mtp_loss"])
        return np.array([record["max_vio"][:trunk] for record in self.steps])


def read_run(run: Path, train: TrainConfig) -> Trained:
    """The run of that directory, as far as it has come."""
    records = list(read_metrics(run / "metrics.jsonl"))
    steps = [record for record in records if "loss" in record]
    validation = [record for record in records
                  if "validation_bits_per_byte" in record and record["step"] == train.steps]
    limit = train.guard.max_bad_steps
    ends = [record["step"] for record in steps if record["bad_steps_in_a_row"] >= limit]
    diverged = ends[0] - limit + 1 if ends and not validation else None
    return Trained(steps, validation[-1] if validation else None, diverged)


def relative_difference(loss: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """d_t in percent, of every step that both have."""
    both = min(len(loss), len(baseline))
    ours, theirs = smoothed(loss[:both]), smoothed(baseline[:both])
    return 100 * (ours - theirs) / theirs


def differences(
    runs: Mapping[str, Mapping[str, Trained]], baselines: Mapping[str, str],
) -> dict[tuple[str, str], np.ndarray]:
    """(variant, seed) -> d_t, for every run with a baseline of the same seed that has not diverged, as far as both are.

    Of one that diverged, up to the step before. Raises `UserError` for two that begin at different steps.
    """
    found = {}
    for name, other in baselines.items():
        for seed, run in runs.get(name, {}).items():
            baseline = runs.get(other, {}).get(seed)
            if run.steps and baseline and baseline.steps and baseline.diverged is None:
                require(run.first() == baseline.first(), f"{name!r} begins at step {run.first()} and {other!r}, its "
                        f"baseline, at {baseline.first()} (seed {seed}): they cannot be compared; delete the directory "
                        "of the one that is out of date")
                found[name, seed] = relative_difference(run.loss()[:run.good()], baseline.loss())
    return found


def sizes(difference: np.ndarray) -> np.ndarray:
    """|d_t| where there is one: nothing is finite before the first good step."""
    return np.abs(difference[np.isfinite(difference)])


def figures(run: Trained, difference: np.ndarray | None, warmup: int) -> dict[str, float | int | None]:
    """Of one finished run: losses and the trunk's MaxVio (mean and worst layer) over its last steps, its validation,
    its median speed, and the largest, mean and final |d_t| after `warmup` steps, None without a baseline.

    Of a run that diverged or is under way only where, and the differences up to there.
    """
    after = np.zeros(0) if difference is None else sizes(difference[run.after(warmup)])
    largest, mean, final = (float(after.max()), float(after.mean()), float(after[-1])) if len(after) else (None,) * 3
    relative = {"relative_largest": largest, "relative_mean": mean, "relative_final": final, "diverged": run.diverged}
    if run.validation is None:
        return relative | {"last_step": run.steps[-1]["step"]}
    last = run.steps[-max(1, int(LAST * len(run.steps))):]
    vio_SL = run.max_vio()[-len(last):]
    speeds = [record["tokens_per_second"] for record in run.steps if "tokens_per_second" in record]
    agreement = run.validation["validation_mtp_agreement"]
    trunk = vio_SL.shape[1]
    return {
        "loss": float(np.nanmean([record["loss"] for record in last])),  # a bad step that changed nothing has NaN
        "mtp_loss": float(np.nanmean([record["mtp_loss"] for record in last])) if last[0]["mtp_loss"] else None,
        "validation_bits_per_byte": run.validation["validation_bits_per_byte"],
        "max_vio": float(vio_SL.mean()), "max_vio_worst_layer": float(vio_SL.mean(axis=0).max()),
        "validation_max_vio": float(np.mean(run.validation["validation_max_vio"][:trunk])),
        "mtp_agreement": agreement[0] if agreement else 0.0,
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "tokens": run.steps[-1]["tokens"],
    } | relative


def curves(run: Trained, difference: np.ndarray | None) -> dict[str, list[float | None]]:
    """Means over every `CURVE` steps, beside the tokens consumed at their end; None where nothing finite is."""
    def means(values: np.ndarray) -> list[float | None]:
        groups = [values[start:start + CURVE] for start in range(0, len(run.steps) // CURVE * CURVE, CURVE)]
        finite = [group[np.isfinite(group)] for group in groups]
        return [round(float(group.mean()), 5) if len(group) else None for group in finite]

    found = {
        "tokens": [record["tokens"] for record in run.steps[CURVE - 1::CURVE]],
        "loss": means(run.loss()),
        "mtp_loss": means(np.array([np.mean(record["mtp_loss"] or np.nan) for record in run.steps])),
        "max_vio": means(run.max_vio().mean(axis=1)),
    }
    return found if difference is None else found | {"relative_difference_percent": means(difference)}


def plot_comparison(
    runs: Mapping[str, Mapping[str, Trained]], apart: Mapping[tuple[str, str], np.ndarray], noise: str | None,
    warmup: int, path: Path,
) -> None:
    """Smoothed losses, below them d_t (`apart`) with the range of `noise` shaded, and MaxVio (mean over the trunk)."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplot_mosaic([["loss", "vio"], ["difference", "vio"]], sharex=True, width_ratios=[3, 2])
    largest = 0.0
    for number, (name, seeds) in enumerate(runs.items()):
        style = dict(color=f"C{number % 10}", linestyle=("-", "--", ":")[number // 10 % 3], linewidth=1)
        for index, (seed, run) in enumerate(seeds.items()):
            tokens = np.array([record["tokens"] / 1e6 for record in run.steps])
            ended = "" if run.diverged is None else f", diverged at step {run.diverged}"
            panels["loss"].plot(tokens, smoothed(run.loss()), **style, label=None if index else name + ended)
            panels["vio"].plot(tokens, smoothed(run.max_vio().mean(axis=1)), **style)
            difference = apart.get((name, seed), np.zeros(0))
            shown = run.after(warmup)
            panels["difference"].plot(tokens[:len(difference)][shown], difference[shown], **style)
            if run.diverged is None:
                largest = max(largest, sizes(difference[shown]).max(initial=0.0))
    band = [sizes(d[runs[name][seed].after(warmup)]).max(initial=0.0)
            for (name, seed), d in apart.items() if name == noise]
    if band:
        panels["difference"].axhspan(-max(band), max(band), color="0.85", zorder=0,
                                     label=f"{noise}: at most {max(band):.3f}%")
    if largest:
        panels["difference"].set_ylim(-1.1 * largest, 1.1 * largest)
    panels["loss"].set(ylabel="training loss, EMA 0.9 (nats per token)")
    panels["difference"].set(xlabel="million tokens", ylabel="loss relative to baseline (%)")
    panels["vio"].set(xlabel="million tokens", ylabel="MaxVio, mean over layers", yscale="log")
    for axes in panels.values():
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
