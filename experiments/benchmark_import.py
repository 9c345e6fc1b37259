"""Peak memory and speed of an import: python -m experiments.benchmark import --gigabytes=4 --scratch=DIR"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags

from dsv3.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, YarnConfig, require
from dsv3.interop.hf_config import to_hf_config
from dsv3.interop.layout import SCALE, kept_fp8, table
from dsv3.interop.safetensors import FILE_BYTES, n_bytes, write

GIGA = 10**9


def define_flags() -> None:
    """Flags of this command."""
    flags.DEFINE_float("gigabytes", 4.0, "size of the generated checkpoint", lower_bound=0.01)
    flags.DEFINE_string("scratch", None, "an empty or missing directory with room for twice that")


def v3_like(n_layers: int) -> ModelConfig:
    """V3's heads, ranks and ragged kv_a_proj (576 x 1536) in a narrow model of 0.16 GB a layer in FP8, MTP included."""
    return ModelConfig(
        vocab_size=8192, dim=1536, inter_dim=4096, n_layers=n_layers, n_dense_layers=1, norm_eps=1e-6, init_std=0.02,
        dtype="bfloat16", remat="report", scan_unroll=1,
        attention=AttentionConfig(
            n_heads=8, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            norm_eps=1e-6, rope_theta=10000.0, yarn=YarnConfig(
                factor=40.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)),
        moe=MoEConfig(
            n_routed_experts=64, n_shared_experts=1, n_activated_experts=8, n_expert_groups=8, n_limited_groups=4,
            moe_inter_dim=512, score_func="sigmoid", selection_bias=True, norm_topk_prob=True, route_scale=2.5),
        mtp=MTPConfig(depth=1, eh_order="embedding_first", hidden="post_norm"))


def write_fp8(directory: Path, config: ModelConfig, seed: int, file_bytes: int = FILE_BYTES) -> int:
    """A checkpoint of random E4M3 weights with their scales, of `config`; its bytes of tensors."""
    entries = {entry.name: entry for entry in kept_fp8(table(config))}
    originals = {entry.path: name for name, entry in entries.items() if not entry.copy}
    shapes = {}
    for name, entry in entries.items():
        narrow = "F8_E4M3" if entry.fp8 else "BF16"
        single = name.endswith(SCALE) or entry.path[0] == "routing"
        shapes[name] = "F32" if single else narrow, entry.shape
    numbers = {name: index for index, name in enumerate(entries)}

    def produce(name: str) -> np.ndarray:
        dtype, shape = shapes[name]
        rng = np.random.default_rng([seed, numbers[originals[entries[name].path]] if entries[name].copy
                                     else numbers[name]])
        if dtype == "F8_E4M3":
            noise = np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8) & 0xFB  # never 0x7F or 0xFF, the NaNs
            return noise.view(ml_dtypes.float8_e4m3fn).reshape(shape)
        if name.endswith(SCALE):
            return rng.uniform(1e-5, 1e-4, shape).astype(np.float32)
        return (0.02 * rng.standard_normal(shape) + (len(shape) == 1)).astype(
            np.float32 if dtype == "F32" else ml_dtypes.bfloat16)

    directory.mkdir(parents=True)
    write(directory, shapes, produce, file_bytes=file_bytes)
    (directory / "config.json").write_text(json.dumps(to_hf_config(config, fp8=True), indent=2))
    return sum(n_bytes(*info) for info in shapes.values())


def measured(command: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak memory in bytes (resident, mapped files included) of a Python command in its own process."""
    start, peak = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, *command])
    while child.poll() is None:
        # Not getrusage, which counts what the parent had in memory when it started the child.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    require(child.returncode == 0, f"the child failed with status {child.returncode}")
    return time.perf_counter() - start, peak


def import_command(hf: Path, workdir: Path) -> list[str]:
    """What a user types, after `python`."""
    return ["-m", "experiments.convert", "import", f"--hf={hf}", f"--workdir={workdir}"]


def load_command(hf: Path) -> list[str]:
    """Loading into the memory of the first device, FP8 kept."""
    return ["-c", f"import jax; from pathlib import Path; from dsv3.interop.load import load; "
            f"jax.block_until_ready(load(Path({str(hf)!r}), dtype=None)[1])"]


def main(overrides: Sequence[str]) -> None:
    """Generate, import, print."""
    scratch = flags.FLAGS.scratch
    require(not overrides and scratch is not None, "give --scratch=DIR with room for twice --gigabytes")
    directory = Path(scratch)
    require(not directory.exists() or not any(directory.iterdir()), f"--scratch={scratch} is not empty")
    config = v3_like(max(2, round(flags.FLAGS.gigabytes / 0.16) - 1))
    size = write_fp8(directory / "hf", config, seed=0)
    seconds, peak = measured(import_command(directory / "hf", directory / "run"))
    loading, loaded = measured(load_command(directory / "hf"))
    stored = sum(path.stat().st_size for path in (directory / "run" / "checkpoints").rglob("*.bin"))
    shutil.rmtree(directory)
    bound = 1.15 * stored + GIGA
    print(f"checkpoint {size / GIGA:.2f} GB, destination {stored / GIGA:.2f} GB, bound {bound / GIGA:.2f} GB")
    for name, took, memory in ("import", seconds, peak), ("load", loading, loaded):
        print(f"{name}: peak memory {memory / GIGA:.2f} GB, {took:.0f} s, {size / GIGA / took:.2f} GB/s")
