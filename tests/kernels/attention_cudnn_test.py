"""What can be known of cuDNN attention without a GPU: the mask, the layout around the primitives, what is kept.

The numbers of cuDNN itself are compared with the reference by `benchmark attention` on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import distance

from dsv3.kernels import attention_cudnn
from dsv3.kernels.attention import ATTENTION, Heads, attend

B, T, H, N, R, U = 2, 16, 3, 128, 64, 128
SEGMENTS_BT = np.array([[1] * 5 + [2] * 11, [1] * 16])


def inputs(dtype=jnp.bfloat16):
    """The three arrays of `Heads`."""
    rng = np.random.default_rng(0)
    shapes = [(B, T, H, N + R), (B, T, H, N + U), (B, T, R)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def rotation():
    angles_BTP = np.random.default_rng(1).standard_normal((B, T, R // 2))
    return jnp.asarray(np.stack([np.cos(angles_BTP), np.sin(angles_BTP)]), jnp.float32)


def gradients(attention, segment_ids_BT):
    run = lambda *heads: attend(attention, Heads(*heads), rotation(), 192 ** -0.5, segment_ids_BT)
    out, vjp = jax.vjp(run, *inputs())
    return out, *vjp(jnp.ones_like(out))


def plain(q, k, v, bias, settings):
    """What cuDNN computes from the operands it is given, in float32."""
    assert settings["mask_type"].name == "CAUSAL" and settings["layout"] == 0
    scores = jnp.einsum("bthx,bshx->bhts", q.astype(jnp.float32), k.astype(jnp.float32)) * settings["scale"]
    if settings["variadic_args"][0]:
        scores += bias.astype(jnp.float32)
    scores = jnp.where(jnp.tril(jnp.ones((1, 1, T, T), bool)), scores, -jnp.inf)
    out = jnp.einsum("bhts,bshu->bthu", jax.nn.softmax(scores, axis=-1), v.astype(jnp.float32))
    return out.astype(q.dtype)


class Forward:
    @staticmethod
    def bind(q, k, v, bias, *unused, is_training, **settings):
        assert is_training
        return plain(q, k, v, bias, settings), jnp.zeros((B, H, T), jnp.float32)


class Backward:
    @staticmethod
    def bind(q, k, v, bias, *rest, **settings):
        *_, normaliser, out, d_out = rest
        return jax.vjp(lambda *a: plain(*a, bias, settings), q, k, v)[1](d_out)


@pytest.mark.parametrize("segment_ids_BT", [None, SEGMENTS_BT], ids=["one document", "packed"])
def test_operands_and_gradients_are_those_of_the_reference(monkeypatch, segment_ids_BT):
    """With the primitives replaced: rotation and back, the shared key's gradient summed over heads, and the bias."""
    monkeypatch.setattr(attention_cudnn.cudnn, "_dot_product_attention_fwd_p_wrapper", Forward)
    monkeypatch.setattr(attention_cudnn.cudnn, "_dot_product_attention_bwd_p_wrapper", Backward)
    actual = gradients(attention_cudnn.CUDNN, segment_ids_BT)
    expected = gradients(ATTENTION, segment_ids_BT)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape and distance(got, wanted) < 0.02


def test_bias_is_zero_within_a_segment_and_hides_what_is_across():
    bias = np.asarray(attention_cudnn.segment_bias(jnp.array(SEGMENTS_BT), jnp.bfloat16), np.float32)
    assert bias.shape == (B, 1, T, T)
    same = SEGMENTS_BT[:, :, None] == SEGMENTS_BT[:, None, :]
    np.testing.assert_array_equal(bias[:, 0] == 0, same)
    assert np.all(bias[:, 0][~same] < -1e9) and np.all(np.isfinite(bias))


def lowered(function):
    return jax.jit(function).trace(*inputs()).lower(lowering_platforms=("cuda",)).as_text()


def test_a_policy_that_keeps_the_output_runs_the_forward_kernel_once():
    run = lambda *heads: attend(attention_cudnn.CUDNN, Heads(*heads), rotation(), 1.0, None)
    loss = lambda policy: lambda *a: jnp.sum(jax.checkpoint(run, policy=policy)(*a).astype(jnp.float32))
    policies = jax.checkpoint_policies
    text = {name: lowered(jax.value_and_grad(loss(policy), argnums=range(3))) for name, policy in {
        "kept": policies.save_only_these_names("attn.core"), "not kept": policies.nothing_saveable}.items()}
    for name, forwards in {"kept": 1, "not kept": 2}.items():
        assert text[name].count("__cudnn$fmhaSoftmax(") == forwards, name
        assert text[name].count("__cudnn$fmhaSoftmaxBackward(") == 1


@pytest.mark.parametrize("q_width, v_width, dtype, why", [
    (192, 128, jnp.float32, "float32"), (96, 64, jnp.bfloat16, "96 / 64"), (576, 512, jnp.bfloat16, "576 / 512")])
def test_refuses_other_heads(q_width, v_width, dtype, why):
    assert why in attention_cudnn.refusal(q_width, v_width, dtype)


def test_accepts_the_heads_of_v3():
    assert attention_cudnn.refusal(192, 128, jnp.bfloat16) is None
