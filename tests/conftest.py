"""JAX as the tests need it: strict, small, eight CPU devices, with a compilation cache that outlives the process."""

import gc
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Eight devices on two busy cores: a collective may wait long for the last of them. Most of the time goes into compiling
# programs that run for milliseconds: without LLVM's optimizations that takes a third less, and without the emitters
# that set up all of MLIR for every fusion, less than half of the rest (jaxlib 0.11.2).
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
                      "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
                      "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 "
                      "--xla_cpu_collective_call_terminate_timeout_seconds=300")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Traced programs are many small objects that stay: to look for garbage after every 700 takes a tenth of the time.
gc.set_threshold(50_000)

if sys.version_info < (3, 12, 2):
    # `signal.signal` formats a handler that is no number, and asyncio's holds the result of its task: after every
    # restoration all arrays were printed for nobody (CPython gh-112559).
    to_enum = signal._int_to_enum
    signal._int_to_enum = lambda value, names: to_enum(value, names) if isinstance(value, int) else value
