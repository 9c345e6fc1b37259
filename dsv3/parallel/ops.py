"""Which kernels run where: the one place that looks at the backend."""

from collections.abc import Callable
from functools import partial

import jax
from absl import logging

from dsv3.config import QuantConfig, UserError, require
from dsv3.kernels import attention_cudnn, attention_rotary_hopper, grouped_dot_hopper
from dsv3.kernels.attention import ATTENTION, Attention, Heads, attend
from dsv3.kernels.fp8_hopper import fast_or_reference, hopper_kernels
from dsv3.kernels.fp8_kernels import REFERENCE, Kernels
from dsv3.kernels.grouped_dot import grouped_dot
from dsv3.model.fp8_ops import fp8_ops
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
    raise UserError(f"no Hopper kernel for {reason}; change that, or use kernels=auto for the slow reference")


def chosen_attention(kind: str, refuse: Callable[[str], None]) -> Attention:
    """Our kernels for a device of this kind, cuDNN's for heads of another size, or the reference where both refuse.

    Without tokens there is no tile to compute and nothing to refuse: the reference's empty arrays are the answer.
    """
    ours = attention_rotary_hopper.attention(kind)

    def choose(heads: Heads) -> Attention:
        if not heads.q_BTHX.size:
            return ATTENTION
        if not attention_rotary_hopper.refusal(heads):
            return ours
        reason = attention_cudnn.refusal(heads.q_BTHX.shape[-1], heads.n_value, heads.kv_BTHY.dtype)
        if reason:
            refuse(reason)
        return ATTENTION if reason else attention_cudnn.CUDNN

    return Attention(
        lambda heads, *rest: choose(heads).forward(heads, *rest),
        lambda heads, *rest: choose(heads).backward(heads, *rest))


def with_fallbacks(kind: str, attention: Attention, refuse: Callable[[str], None]) -> Ops:
    """The Hopper bundle with this attention for a device of this kind, whose operations call `refuse(reason)` on shapes
    they cannot run, and then take the reference."""
    def product(rows_JD, sizes_E, w_EDF, block):
        reason = grouped_dot_hopper.refusal(*w_EDF.shape[1:], rows_JD.dtype, block)
        if reason:
            refuse(reason)
        run = grouped_dot if reason else grouped_dot_hopper.grouped_dot_hopper
        return run(rows_JD, sizes_E, w_EDF, block)

    norm = fast_or_reference("norm", kind, refuse)
    return hopper_ops(attention=partial(attend, attention), grouped_dot=product, norm=norm)


def with_recipe(recipe: QuantConfig | None, base: Ops, kernels: Callable[[], Kernels]) -> Ops:
    """`base`, or `recipe` carried out by `kernels()` with `base` for what it leaves alone."""
    return base if recipe is None else fp8_ops(recipe, kernels(), base)


def _on_hopper(recipe: QuantConfig | None, refuse: Callable[[str], None]) -> Ops:
    kind = jax.devices()[0].device_kind
    attention = chosen_attention(kind, refuse)
    base = with_fallbacks(kind, attention, refuse)
    return with_recipe(recipe, base, partial(hopper_kernels, kind, attention, refuse))


def text_ops(recipe: QuantConfig | None) -> Ops:
    """For decoding, in plain jnp: a step has few tokens, so experts' rows come in small blocks."""
    return _reference(recipe, row_block=8)


def _reference(recipe: QuantConfig | None, **settings) -> Ops:
    return with_recipe(recipe, reference_ops(**settings), lambda: REFERENCE)


def _auto(recipe: QuantConfig | None) -> Ops:
    """Warns once per reason and bundle; the bundle is built once a program. A CPU is expected to be slow."""
    device, refuse = jax.devices()[0], partial(_warn, set())
    if is_hopper(device):
        return _on_hopper(recipe, refuse)
    if device.platform == "gpu":
        refuse(f"{device.device_kind} has compute capability {device.compute_capability}; all kernels are for Hopper's "
               "(9.0)")
    return _reference(recipe)


def _require(recipe: QuantConfig | None) -> Ops:
    device = jax.devices()[0]
    require(is_hopper(device), f"kernels=require needs a Hopper GPU (compute capability 9.0); the default device is "
            f"{device.device_kind}; use kernels=auto or kernels=reference")
    return _on_hopper(recipe, _raise)


def make_ops(kernels: str, recipe: QuantConfig | None) -> Ops:
    """The operations of one device: `auto` picks by device and shape, `reference` is plain jnp.

    `recipe` None: every product in the model's dtype. `require` raises UserError where no fast kernel applies. Build
    the bundle once and close over it.
    """
    makers = {"auto": _auto, "reference": _reference, "require": _require}
    require(kernels in makers, f"kernels is {kernels!r}; expected one of {', '.join(makers)}")
    return makers[kernels](recipe)
