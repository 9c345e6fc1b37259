"""The released configurations, ours beside them, and small checkpoints of either kind."""

import importlib.util
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from tiny_models import model_config

from dsv3.config import ModelConfig
from dsv3.interop.safetensors import Reader, write

ROOT = Path(__file__).parents[1]
NAMES = ["deepseek_v3_671b", "deepseek_v2_lite_16b", "moonlight_16b_a3b", "kimi_k2_1t"]
RAGGED = model_config(
    vocab_size=300, dim=192, inter_dim=256,
    attention=dict(n_heads=5, q_lora_rank=96, kv_lora_rank=72, qk_nope_head_dim=32, v_head_dim=40),
    moe=dict(moe_inter_dim=128))
"""V3 in miniature with MTP; blocks of 128 are ragged in every matrix but for the widths of gated products."""


def published(name: str = "deepseek_v3_671b", **changes) -> dict:
    """A released config.json with keys changed, or left out (`...`)."""
    found = json.loads((ROOT / "tests/published" / f"{name}.json").read_text()) | changes
    return {key: value for key, value in found.items() if value is not ...}


def ours(name: str) -> ModelConfig:
    """The model of a file in configs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().model


def tensors(directory):
    """Name -> (dtype, shape, bytes)."""
    reader = Reader(directory)
    return {name: (*info[:2], reader.read(name).tobytes()) for name, info in reader.tensors.items()}


def rewrite(source, directory, change):
    """A copy of a checkpoint whose dictionary of arrays `change` has altered."""
    reader = Reader(source)
    arrays = {name: np.array(reader.read(name)) for name in reader.tensors}
    change(arrays)
    names = {np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3", np.dtype(ml_dtypes.bfloat16): "BF16",
             np.dtype(np.float32): "F32", np.dtype(np.int32): "I32"}
    directory.mkdir()
    write(directory, {name: (names[a.dtype], a.shape) for name, a in arrays.items()}, arrays.__getitem__)
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory
