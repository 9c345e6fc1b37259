"""Runs that take seconds: a corpus of a few generated Python files and a model of a few thousand parameters."""

import json
from pathlib import Path

import numpy as np

from dsv3.config import Config, override
from experiments.launch import load_config

SMALL = {
    "model.vocab_size": "300", "model.dim": "24", "model.inter_dim": "32", "model.n_layers": "2",
    "model.remat": "none", "model.attention.n_heads": "2", "model.attention.q_lora_rank": "16",
    "model.attention.kv_lora_rank": "16", "model.attention.qk_nope_head_dim": "8",
    "model.attention.qk_rope_head_dim": "8", "model.attention.v_head_dim": "8", "model.moe.moe_inter_dim": "16",
    "data.tokenizer": "bytes", "data.validation_fraction": "0.2", "data.eval_bytes": "600", "data.eval_stride": "16",
    "train.seq_len": "32", "train.micro_batch_size": "2", "train.batch_increment": "4",
    "train.batch_size.0.start": "4", "train.batch_size.0.end": "4",
    "train.steps": "6", "train.log_every": "2", "train.eval_every": "4", "train.checkpoint_every": "3",
}

ONE_LAYER = {"model.n_layers": "1", "model.n_dense_layers": "0", "model.mtp.depth": "0"}
"""Added to `SMALL`: half the compilation, for what does not depend on the model."""


def write_corpus(directory: Path, files: int = 24) -> Path:
    """Small functions over random names, so that there is something to learn."""
    rng = np.random.default_rng(0)
    names = ["alpha", "beta", "gamma", "delta", "value", "total"]
    directory.mkdir(parents=True)
    for index in range(files):
        a, b, c = rng.choice(names, 3)
        lines = [f"def {a}_{index}({b}, {c}):", f"    {a} = {b} + {c} * {rng.integers(100)}", f"    return {a}", ""]
        (directory / f"module_{index}.py").write_text("\n".join(lines * 4))
    return directory


def small_overrides(corpus: Path, **more: str) -> dict[str, str]:
    return SMALL | {"data.sources.0.files": str(corpus)} | more


def small_config(corpus: Path, **more: str) -> Config:
    return override(load_config("configs/tiny.py", []), small_overrides(corpus, **more))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_metrics(directory, losses, *, bad=(), validated=True, first=1):
    """A run of these losses by step from `first` on, the steps `bad` without a finite one, as the loop logs them."""
    directory.mkdir(parents=True)
    lines, streak = [], 0
    for step, loss in enumerate(losses, start=first):
        streak = streak + 1 if step in bad else 0
        record = {"step": step, "tokens": 64 * step, "loss": None if step in bad else float(loss), "mtp_loss": [2.0],
                  "max_vio": [1.0, 3.0, 50.0], "bad_steps_in_a_row": streak}
        lines.append(record | ({"tokens_per_second": 100.0 + step} if step % 10 == 0 else {}))
    if validated:
        last = first + len(losses) - 1
        lines.append({"step": last, "tokens": 64 * last, "validation_bits_per_byte": 1.25,
                      "validation_mtp_agreement": [0.5], "validation_max_vio": [1.0, 2.0, 99.0]})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
