"""Which kernels run where: the one place that looks at the backend."""

from collections.abc import Callable
from functools import partial

import jax
from absl import logging

from dsv3.config import UserError, require
from dsv3.kernels import attention_cudnn, grouped_dot_hopper
from dsv3.kernels.attention import causal_attention
from dsv3.kernels.grouped_dot import grouped_dot
from dsv3.model.hopper_ops import hopper_ops
from dsv3.model.ops import Ops, reference_ops


def is_hopper(device: jax.Device) -> bool:
    """Compute capability 9.0: H100, H200, H800."""
    return device.platform == "gpu" and device.compute_capability == "9.0"


def _warn(refused: set[str], reason: str) -> None:
    if reason not in refused:
        refused.add(reason)
        logging.warning("falling back to the slow reference: %s", reason)


def _raise(reason: str) -> None:
    raise UserError(f"no Hopper kernel for {reason}; change the sizes, or use kernels=auto for the slow reference")


def with_fallbacks(refuse: Callable[[str], None]) -> Ops:
    """The Hopper bundle whose operations call `refuse(reason)` on shapes they cannot run, then take the reference."""
    def attention(q_nope_BTHN, q_rope_BTHR, k_nope_BTHN, k_rope_BTR, v_BTHU, **settings):
        q_width = q_nope_BTHN.shape[-1] + q_rope_BTHR.shape[-1]
        reason = attention_cudnn.refusal(q_width, v_BTHU.shape[-1], v_BTHU.dtype)
        if reason:
            refuse(reason)
        run = causal_attention if reason else attention_cudnn.causal_attention_cudnn
        return run(q_nope_BTHN, q_rope_BTHR, k_nope_BTHN, k_rope_BTR, v_BTHU, **settings)

    def product(rows_JD, sizes_E, w_EDF, block):
        reason = grouped_dot_hopper.refusal(*w_EDF.shape[1:], rows_JD.dtype, block)
        if reason:
            refuse(reason)
        run = grouped_dot if reason else grouped_dot_hopper.grouped_dot_hopper
        return run(rows_JD, sizes_E, w_EDF, block)

    return hopper_ops(attention=attention, grouped_dot=product)


def _auto() -> Ops:
    """Warns once per reason and bundle; the bundle is built once a program."""
    return with_fallbacks(partial(_warn, set())) if is_hopper(jax.devices()[0]) else reference_ops()


def _require() -> Ops:
    device = jax.devices()[0]
    require(is_hopper(device), f"kernels=require needs a Hopper GPU (compute capability 9.0); the default device is "
            f"{device.device_kind}; use kernels=auto or kernels=reference")
    return with_fallbacks(_raise)


def make_ops(kernels: str) -> Ops:
    """The operations of one device: `auto` picks by device and shape, `reference` is plain jnp.

    `require` raises UserError where no fast kernel applies. Build the bundle once and close over it.
    """
    makers = {"auto": _auto, "reference": reference_ops, "require": _require}
    require(kernels in makers, f"kernels is {kernels!r}; expected one of {', '.join(makers)}")
    return makers[kernels]()
