"""Pictures of a run, drawn from its `metrics.jsonl`: the loss curve and the load of every expert over time."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def smoothed(values: Sequence[float], decay: float = 0.9) -> np.ndarray:
    """Exponential moving average, corrected for its start. A value that is not finite leaves it as it was."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(average / weight if weight else math.nan)
    return np.array(out)


def plot_loss(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss (next token and every MTP depth) and validation bits per byte against consumed tokens."""
    steps = [record for record in records if "loss" in record]
    if not steps:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    tokens = [record["tokens"] for record in steps]
    axes.plot(tokens, [record["loss"] for record in steps], color="C0", alpha=0.25)
    axes.plot(tokens, smoothed([record["loss"] for record in steps]), color="C0", label="next token")
    for depth in range(len(steps[0]["mtp_loss"])):
        curve = smoothed([record["mtp_loss"][depth] for record in steps])
        axes.plot(tokens, curve, color=f"C{depth + 2}", label=f"MTP depth {depth + 1}")
    axes.set(xlabel="consumed tokens", ylabel="training loss (nats per token)", title="Loss")
    validation = [record for record in records if "validation_bits_per_byte" in record]
    if validation:
        right = axes.twinx()
        right.plot([record["tokens"] for record in validation],
                   [record["validation_bits_per_byte"] for record in validation], "k.--", label="validation")
        right.set_ylabel("validation bits per byte")
        right.legend(loc="upper center")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_expert_load(records: Sequence[dict[str, Any]], path: Path, columns: int = 100) -> None:
    """One panel per MoE layer: every expert's share of the mean load over time (1 is perfect balance)."""
    steps = [record for record in records if "load" in record]
    if not steps or not steps[0]["load"]:
        return
    load_SLE = np.array([record["load"] for record in steps], np.float64)
    groups = np.array_split(np.arange(len(steps)), min(columns, len(steps)))
    load_SLE = np.stack([load_SLE[group].mean(axis=0) for group in groups])
    share_SLE = load_SLE / np.maximum(load_SLE.mean(axis=-1, keepdims=True), 1e-9)
    n_layers, n_experts = share_SLE.shape[1:]
    figure = Figure(figsize=(8, 1 + 1.3 * n_layers), layout="constrained")
    panels = figure.subplots(n_layers, 1, squeeze=False, sharex=True)[:, 0]
    extent = (steps[0]["step"], steps[-1]["step"], n_experts - 0.5, -0.5)
    for layer, panel in enumerate(panels):
        image = panel.imshow(share_SLE[:, layer].T, aspect="auto", extent=extent, cmap="coolwarm", vmin=0, vmax=2,
                             interpolation="nearest")
        panel.set_ylabel(f"MoE layer {layer}\nexpert")
    panels[-1].set_xlabel("step")
    figure.colorbar(image, ax=panels.tolist(), label="load / mean load")
    figure.savefig(path, dpi=120)
