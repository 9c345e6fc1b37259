"""The numerics monitor: what a recipe's formats do to every operand of every product of a model, on one global batch.

A program of its own, compiled when it is first asked for: the training step is the same with and without it. It takes
about a step and a half, and needs the memory of a step of the reference bundle.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tensorboardX import SummaryWriter

from dsv3.kernels.watched import take
from dsv3.model.batch import Batch
from dsv3.model.watching_ops import site_of
from dsv3.parallel.mesh import place_local
from dsv3.quant.monitor import BINS, LOWEST, OPERANDS, WIDTH, Statistics, rates
from dsv3.train.metrics import JsonLines
from dsv3.train.step import Knobs, Recipe, make_gradients

FIGURES = ("underflow", "subnormal", "saturation", "nonfinite", "error", "log2_scale")
"""What becomes a TensorBoard scalar."""


LIKE = {name: Statistics(*[np.zeros(())] * (len(Statistics._fields) - 1), np.zeros(BINS)) for name in OPERANDS}
"""The shape of a product's mail: `observe_product`'s."""


def _is_stacked(path: Sequence[str]) -> bool:
    """Whether a parameter has its layers on axis 0."""
    return path[0].endswith("_layers")


@lru_cache(maxsize=2)
def make_numerics(recipe: Recipe) -> Callable[[chex.ArrayTree, chex.ArrayTree, Batch, Knobs], dict]:
    """(params, routing, batches [M, B, T], knobs) -> the parameter's path of every product -> its mail.

    The model of `recipe` must have a bundle of `watching_ops`. Mail of layers in a scan is stacked, [L, numbers]; that
    of micro-batches and devices is summed, so a weight counts once for each of them.
    """
    gradients, replicated = make_gradients(recipe), NamedSharding(recipe.mesh, P())
    numbers = sum(leaf.size for leaf in jax.tree.leaves(LIKE))

    def program(params, routing, batches, knobs):
        mail, _ = gradients(params, routing, batches, knobs)
        found = {tuple(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(mail)}
        return {"/".join(path): leaf.reshape(*leaf.shape[:_is_stacked(path)], -1)[..., :numbers]
                for path, leaf in found.items() if site_of(path)}

    return jax.jit(program, out_shardings=replicated)


def numerics(
    recipe: Recipe, params: chex.ArrayTree, routing: chex.ArrayTree, batches: Batch, knobs: Knobs,
) -> list[dict[str, Any]]:
    """One record for every layer, site and operand: their names, and `rates`. Sites that are not watched have none.

    `batches` [M, B, T] are this process's rows, on the host; `recipe` as for `make_numerics`.
    """
    found = jax.device_get(make_numerics(recipe)(params, routing, place_local(recipe.mesh, batches), knobs))
    records = []
    for path, mail in found.items():
        keys = tuple(path.split("/"))
        places = [f"{keys[0]}.{layer}" for layer in range(len(mail))] if _is_stacked(keys) else keys[:1]
        for place, numbers in zip(places, mail.reshape(len(places), -1), strict=True):
            operands = take(numbers, LIKE)
            records += [{"layer": place, "site": site_of(keys), "operand": name} | rates(operands[name])
                        for name in OPERANDS if operands[name].elements > 0]
    return records


class NumericsWriter:
    """Appends to `workdir/numerics.jsonl` and `workdir/tensorboard/numerics`. Use as a context manager.

    Opening at `step` drops the lines beyond it, like `MetricsWriter`.
    """

    def __init__(self, workdir: Path, step: int) -> None:
        self._lines = JsonLines(workdir / "numerics.jsonl", step)
        self._board = SummaryWriter(str(workdir / "tensorboard" / "numerics"), purge_step=step + 1)

    def __enter__(self) -> "NumericsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()
        self._board.close()

    def write(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """One line each; their figures as scalars and their scales as histograms, by layer, site and operand.

        A full disk is reported, and does not stop the run.
        """
        try:
            self._lines.append({"step": step} | record for record in records)
            self._to_board(step, records)
        except OSError as error:
            logging.error("numerics of step %d could not be written (%s)", step, error)

    def _to_board(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            name = f"{record['layer']}/{record['site']}.{record['operand']}"
            for figure in FIGURES:
                self._board.add_scalar(f"{figure}/{name}", record[figure], step)
            if any(record["scales"]):
                self._board.add_histogram_raw(f"log2_scale/{name}", *_raw_histogram(record["scales"]), step)
        self._board.flush()


def _raw_histogram(scales: Sequence[int]) -> tuple:
    """min, max, count, sum, sum of squares, upper edges and counts of the bins: what TensorBoard's histogram takes."""
    counts, edges = np.asarray(scales, np.float64), LOWEST + WIDTH * np.arange(BINS + 1.0)
    middles, held = (edges[:-1] + edges[1:]) / 2, np.flatnonzero(counts)
    return (edges[held[0]], edges[held[-1] + 1], counts.sum(), counts @ middles, counts @ middles ** 2,
            edges[1:].tolist(), counts.tolist())


def numerics_table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table, one line for every layer, site and operand."""
    lines = ["| layer | site | operand | underflow | subnormal | saturation | error | log2 scale |", "|" + "---|" * 8]
    for r in records:
        lines.append(f"| {r['layer']} | {r['site']} | {r['operand']} | {r['underflow']:.2%} | {r['subnormal']:.2%} | "
                     f"{r['saturation']:.2%} | {r['error']:.2%} | {r['log2_scale']:.0f} |")
    return "\n".join(lines)
