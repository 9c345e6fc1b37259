"""Pre-train a model: python -m experiments.pretrain --config=configs/tiny.py --workdir=runs/tiny

Any field can be set: --config.train.steps=200. The same command continues an interrupted run.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dsv3.evaluation.baselines import bigram_bits, xz_bits
from dsv3.model.ops import reference_ops
from dsv3.train.loop import Result, train
from experiments import launch

CONFIG = flags.DEFINE_string("config", None, "Python file whose get_config() returns the experiment", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run: checkpoints, metrics, plots", required=True)


def results(result: Result, seconds: float) -> dict:
    """The final figures of a run, beside those of an n-gram model and a compressor on the same text."""
    prepared, validation = result.prepared, result.validation
    return {
        "step": int(result.state.step),
        "validation_bits_per_byte": validation.bits_per_byte,
        "bigram_bits_per_byte": bigram_bits(
            prepared.tokens_RL, prepared.segment_ids_RL, prepared.validation_documents, prepared.tokenizer.vocab_size),
        "xz_bits_per_byte": xz_bits(prepared.validation_text),
        "max_vio": validation.max_vio,
        "mtp_agreement": validation.mtp_agreement,
        "seconds": seconds,
    }


def main(overrides: Sequence[str]) -> None:
    config = launch.load_config(CONFIG.value, overrides)
    workdir = Path(WORKDIR.value)
    start = time.perf_counter()
    result = train(config, workdir, reference_ops())
    summary = results(result, time.perf_counter() - start)
    (workdir / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    launch.run(main)
