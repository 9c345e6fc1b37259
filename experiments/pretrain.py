"""Pre-train a model: python -m experiments.pretrain --config=configs/tiny.py --workdir=runs/tiny

Any field can be set: --config.train.steps=200. The same command continues an interrupted run.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dsv3.config import Config, require
from dsv3.config.quant import RECIPES
from dsv3.evaluation.baselines import bigram_bits, xz_bits
from dsv3.inference.text import continue_text
from dsv3.model.watching_ops import watching_ops
from dsv3.parallel.distributed import barrier, is_main
from dsv3.parallel.mesh import on_one_device
from dsv3.parallel.ops import make_ops, text_ops
from dsv3.train.loop import Profile, Result, train
from experiments import launch
from experiments.report import results_table

CONFIG = flags.DEFINE_string("config", None, "Python file whose get_config() returns the experiment", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run: checkpoints, metrics, plots", required=True)
PROFILE = flags.DEFINE_bool("profile", False, "write a trace of a few steps to WORKDIR/profile, for TensorBoard")
PROMPT = flags.DEFINE_string("prompt", "def ", "text that the sample printed at the end continues")


def results(result: Result, seconds: float) -> dict:
    """The final figures of a run, beside those of an n-gram model and a compressor on the same text."""
    prepared, validation = result.prepared, result.validation
    return {
        "step": int(result.state.step),
        "validation_bits_per_byte": validation.bits_per_byte,
        "bigram_bits_per_byte": bigram_bits(
            prepared.shards(), prepared.validation_documents, prepared.tokenizer.vocab_size),
        "xz_bits_per_byte": xz_bits(prepared.validation_text),
        "max_vio": validation.max_vio,
        "mtp_agreement": validation.mtp_agreement,
        "mtp_chance": validation.mtp_chance,
        "ema_bits_per_byte": result.ema_validation and result.ema_validation.bits_per_byte,
        "tokens_per_second": result.tokens_per_second,
        "seconds": seconds,
    }


def sample(config: Config, result: Result, prompt: str) -> str:
    """A short continuation of `prompt`, at a temperature low enough to show what was learnt."""
    variables = on_one_device({"params": result.state.params, "routing": result.state.routing})
    pieces = continue_text(
        config.model, text_ops(config.recipe), variables, result.prepared.tokenizer, prompt,
        cache_length=config.train.seq_len, max_new_tokens=100, temperature=0.3, top_p=0.95)
    return prompt + "".join(pieces)


def main(overrides: Sequence[str]) -> None:
    config = launch.load_config(CONFIG.value, overrides)
    require(WORKDIR.value != "", "--workdir is empty; give a directory")
    workdir = Path(WORKDIR.value)
    start = time.perf_counter()
    profile = Profile(workdir / "profile") if PROFILE.value else None
    watching = watching_ops(config.recipe or RECIPES["fp8"], quantized=config.recipe is not None)
    result = train(config, workdir, make_ops(config.kernels, config.recipe), profile, watching)
    if is_main():
        print_results(config, workdir, result, time.perf_counter() - start)
    barrier("results printed", timeout_s=3600)


def print_results(config: Config, workdir: Path, result: Result, seconds: float) -> None:
    """Write `results.json`, unless it is there and no step was left to do; print it with a sample."""
    summary, file = results(result, seconds), workdir / "results.json"
    if summary["tokens_per_second"] or not file.exists():
        file.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\nA sample after step {summary['step']}:\n\n{sample(config, result, PROMPT.value)}\n")
    print(f"Results ({file}; plots {workdir / 'loss.png'}, {workdir / 'expert_load.png'}):\n")
    print(results_table(summary))


if __name__ == "__main__":
    launch.run(main)
