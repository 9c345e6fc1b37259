"""Interpretation of Hopper kernels, also of those whose matrix instructions take registers.

jax's interpreter is made of callbacks, tens of thousands in a kernel; they get their arguments as copies in NumPy here,
since putting each on a device first took a third of all the time. What it does not know is put in terms of what it
does, while a kernel is traced: a product with its left operand in registers, and giving an accumulator a value.
"""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax._src.state import primitives as state
from jax._src.state import types
from jax.experimental.pallas import mosaic_gpu as plgpu

_wgmma = plgpu.wgmma
_to_int = shared_memory._to_int
_NUMPY = SimpleNamespace(device_put=lambda arguments, device: jax.tree.map(np.array, arguments))


@contextmanager
def interpreter(**settings):
    """What is computed inside is interpreted: wait for it there. `settings` of `InterpretGPUParams`."""
    with (mock.patch.object(callback, "api", _NUMPY),
          mock.patch.object(shared_memory, "_to_int", lambda x: int(x) if isinstance(x, np.ndarray) else _to_int(x)),
          plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**settings))):
        yield


def _is_ref(x) -> bool:
    return isinstance(x, types.TransformedRef) or isinstance(jax.typeof(x), types.AbstractRef)


def _set_accumulator(ref, value) -> None:
    state.ref_swap(ref, ..., value)


def _product(acc, a, b) -> None:
    if _is_ref(a):
        _wgmma(acc, a, b)
    else:
        wide = lambda x: x.astype(jnp.float32)
        _set_accumulator(acc, primitives.wgmma_accumulator_load(acc) + jnp.dot(wide(a), wide(b[...])))


@contextmanager
def interpreted():
    """`interpreter` of kernels whose products read registers."""
    with (mock.patch.object(plgpu, "wgmma", _product),
          mock.patch.object(primitives, "wgmma_accumulator_store", _set_accumulator), interpreter()):
        yield


def attention_inputs(batch: int, length: int, heads: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """q with its rotary part not yet turned (other numbers than `q_rope`), q_rope, kv and k_rope, in bfloat16."""
    rng = np.random.default_rng(seed)
    shapes = (batch, length, heads, 192), (batch, length, heads, 64), (batch, length, heads, 256), (batch, length, 64)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)


def split(q_BTHX, q_rope_BTHR, kv_BTHY, k_rope_BTR) -> tuple[jax.Array, ...]:
    """What `causal_attention` takes, in float32."""
    parts = q_BTHX[..., :128], q_rope_BTHR, kv_BTHY[..., :128], k_rope_BTR, kv_BTHY[..., 128:]
    return tuple(part.astype(jnp.float32) for part in parts)
