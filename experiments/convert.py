"""Hugging Face checkpoints in and out: python -m experiments.convert import|export --hf=DIR --workdir=RUN

`import` makes a downloaded checkpoint step 0 of a run; the same command continues an interrupted import. `export`
writes a run's newest checkpoint for transformers, vLLM and SGLang. See docs/interop.md.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dsv3.config import require
from dsv3.interop.export_run import export_run
from dsv3.interop.import_run import import_checkpoint
from experiments import launch

HF = flags.DEFINE_string("hf", None, "directory of the Hugging Face checkpoint", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run", required=True)
DTYPE = flags.DEFINE_string(
    "dtype", None, "import: bfloat16 or float32 (default: keep what is stored, FP8 too); export: bf16, float32 or fp8 "
    "(default: imported weights as they were stored, others in bf16)")
CONFIG = flags.DEFINE_string("config", "configs/imported.py", "import: how the run would train and read text")
EMA = flags.DEFINE_bool("ema", False, "export: the moving average of the weights")
WORKERS = flags.DEFINE_integer("workers", 2, "import: tensors read at the same time", lower_bound=1)


def import_main(overrides: Sequence[str]) -> None:
    require(DTYPE.value in (None, "bfloat16", "float32"), f"--dtype={DTYPE.value}; expected bfloat16 or float32")
    require(not any(text.startswith("model.") for text in overrides), "the model is what config.json says; "
            "--config.model fields cannot be set here")
    template = launch.load_config(CONFIG.value, overrides)
    import_checkpoint(Path(HF.value), Path(WORKDIR.value), template, dtype=DTYPE.value, workers=WORKERS.value)
    print(f"{WORKDIR.value} holds the weights of {HF.value}")


def export_main(overrides: Sequence[str]) -> None:
    require(not overrides, "a run keeps its own configuration; --config fields cannot be set here")
    export_run(Path(WORKDIR.value), Path(HF.value), dtype=DTYPE.value, ema=EMA.value)
    print(f"{HF.value} holds the weights of {WORKDIR.value}")


if __name__ == "__main__":
    launch.run_command({"import": import_main, "export": export_main}, "")
