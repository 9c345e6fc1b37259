"""The table of names and layouts: a bijection between the tensors there and the elements here."""

import math
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import NAMES, ours
from tiny_models import FAMILY, model_config

from dsv3.config import UserError
from dsv3.interop.layout import SCALE, kept_fp8, leaf_shapes, leaves, table
from dsv3.model.batch import Batch
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer

MODELS = {name: ours(name) for name in NAMES} | FAMILY


def variables(config):
    example = Batch(*(jnp.zeros((1, 4), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32)))
    shapes = jax.eval_shape(Transformer(config, reference_ops()).init, jax.random.key(0), example)
    return {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(nn.unbox(shapes))}


@pytest.mark.parametrize("name", MODELS)
def test_it_names_every_array_of_the_model_with_its_shape(name):
    assert leaf_shapes(table(MODELS[name])) == variables(MODELS[name])


@pytest.mark.parametrize("name", FAMILY)
def test_every_element_is_filled_exactly_once(name):
    entries = table(FAMILY[name])
    counts = {path: np.zeros(shape, int) for path, shape in leaf_shapes(entries).items()}
    for entry in entries:
        if not entry.copy:
            assert counts[entry.path][entry.place].size == math.prod(entry.shape)
            counts[entry.path][entry.place] += 1
    assert all((count == 1).all() for count in counts.values())
    assert set(Counter(entry.name for entry in entries).values()) == {1}


def test_v3_has_the_published_tensors_and_elements():
    """Header listing of the release: 91,991 tensors, 684,531,386,000 elements, 688,574,839,360 bytes."""
    entries = list(kept_fp8(table(MODELS["deepseek_v3_671b"])))
    sizes = Counter()
    for entry in entries:
        single = entry.name.endswith(SCALE) or entry.path[0] == "routing"
        sizes["F32" if single else "F8" if entry.fp8 else "BF16"] += math.prod(entry.shape)
    assert len(entries) == len({entry.name for entry in entries}) == 91_991
    assert sum(sizes.values()) == 684_531_386_000
    assert (sizes["F8"], sizes["BF16"]) == (680_571_043_840, 3_918_786_560)
    assert sizes["F8"] + 2 * sizes["BF16"] + 4 * sizes["F32"] == 688_574_839_360
    shapes = {entry.name: entry.shape for entry in entries}
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert "model.layers.61.eh_proj.weight_scale_inv" not in shapes
    assert shapes["model.layers.61.shared_head.head.weight"] == (129280, 7168)


def test_v3_can_be_kept_in_fp8_as_stacked_arrays():
    shapes = leaf_shapes(kept_fp8(table(MODELS["deepseek_v3_671b"])))
    experts = ("params", "moe_layers", "moe", "experts_gate_up")
    assert shapes[(*experts, "values")] == (58, 256, 7168, 4096)
    assert shapes[(*experts, "scales")] == (58, 256, 56, 32)
    assert shapes[("params", "moe_layers", "attn", "kv_a", "scales")] == (58, 56, 5)


@pytest.mark.parametrize("name, count", [
    ("deepseek_v2_lite_16b", 5291), ("moonlight_16b_a3b", 5317), ("kimi_k2_1t", 69975)])
def test_the_other_models_have_as_many_weights_as_their_parameters_say(name, count):
    assert len(table(MODELS[name])) == count


def test_names_and_places_by_hand():
    config = model_config()
    entries = {entry.name: entry for entry in table(config)}
    up = entries["model.layers.2.mlp.experts.5.up_proj.weight"]
    assert up.shape == (12, 24) and up.path == ("params", "moe_layers", "moe", "experts_gate_up")
    assert up.place == (slice(1, 2), slice(5, 6), slice(0, 24), slice(12, 24)) and up.transpose and up.fp8
    bias = entries["model.layers.3.mlp.gate.e_score_correction_bias"]
    assert bias.path == ("routing", "mtp_0", "block", "moe", "bias") and bias.place == (slice(0, 8),)
    assert not entries["model.embed_tokens.weight"].transpose and entries["lm_head.weight"].transpose
    copies = {name for name, entry in entries.items() if entry.copy}
    assert copies == {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    assert [len(parts) for parts in leaves(entries.values()).values()].count(1) > 5


def test_a_block_that_two_matrices_would_share_cannot_be_kept():
    with pytest.raises(UserError, match=r"up_proj.weight begins in the middle .* --dtype=bfloat16"):
        list(kept_fp8(table(model_config(inter_dim=192, moe=dict(moe_inter_dim=128)))))
    list(kept_fp8(table(model_config(inter_dim=256, moe=dict(moe_inter_dim=128)))))
