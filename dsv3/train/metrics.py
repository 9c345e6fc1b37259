"""What a run writes while it trains: `metrics.jsonl` (one line a step) and TensorBoard scalars."""

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from dsv3.config import UserError
from dsv3.train.step import StepMetrics


def step_record(metrics: StepMetrics) -> dict[str, Any]:
    """A step's metrics as JSON values: scalars, and lists per MTP depth and per layer."""
    m = jax.tree.map(np.asarray, metrics)
    return {
        "loss": float(m.loss),
        "mtp_loss": m.mtp_loss_D.tolist(),
        "mtp_agreement": m.mtp_agreement_D.tolist(),
        "balance_loss": float(m.balance),
        "gradient_norm": float(m.gradient_norm),
        "max_vio": m.max_vio_L.tolist(),
        "load": m.load_LE.tolist(),
        "bad_steps_in_a_row": int(m.bad_steps.in_a_row),
        "bad_steps": int(m.bad_steps.total),
    }


class JsonLines:
    """A file of one record a line, each with a `step`, that is appended to whole or not at all.

    Opening at `step` drops the lines that an interrupted run had written beyond the checkpoint it continues from.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(_line(record) for record in kept))
        fresh.replace(path)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def close(self) -> None:
        self._file.close()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """All records, and those that were refused before. Raises `OSError` with nothing written, and keeps them."""
        self._waiting += "".join(map(_line, records)).encode()
        whole = os.fstat(self._file.fileno()).st_size
        try:
            rest = self._waiting
            while rest:
                rest = rest[self._file.write(rest):]
        except OSError:
            os.ftruncate(self._file.fileno(), whole)
            raise
        self._waiting = b""


class MetricsWriter:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard`. Use as a context manager.

    Opening at `step` drops the lines that an interrupted run had written beyond the checkpoint it continues from.
    """

    def __init__(self, workdir: Path, step: int) -> None:
        self._lines = JsonLines(workdir / "metrics.jsonl", step)
        self._board: SummaryWriter | None = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()
        if self._board:
            self._board.close()

    def write(self, *records: Mapping[str, Any]) -> None:
        """One line each, with `null` for a number that is not finite.

        Numbers, and lists of numbers by index, also become TensorBoard scalars (loads do not).

        Lines that a full disk refuses are reported, kept, and written with the next ones; TensorBoard is given up then.
        """
        try:
            self._lines.append(records)
            if self._board:
                for record in records:
                    self._board_scalars(record)
                self._board.flush()
        except OSError as error:
            logging.error("metrics could not be written (%s); they are kept for later", error)
            self._board = None

    def _board_scalars(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name == "load":
                continue
            items = enumerate(value) if isinstance(value, list) else ((None, value),)
            for index, item in items:
                if math.isfinite(item):
                    self._board.add_scalar(name if index is None else f"{name}/{index}", item, record["step"])


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a `metrics.jsonl`, with NaN for `null`; none if there is no file, no last line that was cut off.

    Raises `UserError` for a damaged line before the last.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            yield {name: _number(value) for name, value in json.loads(line).items()}
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"line {number} of {path} is damaged; mend or delete it") from error


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({name: _json(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _json(value: Any) -> Any:
    """JSON has no word for a number that is not finite."""
    if isinstance(value, list):
        return [_json(item) for item in value]
    return value if isinstance(value, str) or math.isfinite(value) else None


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in value]
    return math.nan if value is None else value
