"""Every experiment file: it builds, survives JSON, and has exactly the published number of parameters."""

import importlib.util
import json
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from dsv3.config import Config, from_dict, to_dict
from dsv3.model.batch import Batch
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
NAMES = [path.stem for path in FILES]

# (main model with its selection biases, MTP modules with theirs, activated: head and biases included, embedding not)
PUBLISHED = {
    "deepseek_v3_671b": (671_026_419_200, 11_610_068_224, 36_625_618_432),
    "deepseek_v2_lite_16b": (15_706_484_224, 0, 2_451_435_008),
    "moonlight_16b_a3b": (15_960_110_208, 0, 2_579_231_872),
    "kimi_k2_1t": (1_026_408_232_448, 0, 31_687_095_808),
}


def load(name):
    path = FILES[NAMES.index(name)]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def shapes(config):
    """Parameters and routing of the model, as shapes: 671B of them take a third of a second and no memory."""
    example = Batch(*(jnp.zeros((1, 4), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32)))
    variables = jax.eval_shape(Transformer(config.model, reference_ops()).init, jax.random.key(0), example)
    return variables["params"], variables.get("routing", {})


def size(*trees):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trees))


def split_mtp(tree):
    """(the main model's part, that of the MTP modules)."""
    mtp = {name for name in tree if name.startswith("mtp_")}
    return {name: tree[name] for name in tree.keys() - mtp}, {name: tree[name] for name in mtp}


def idle_experts(moe_params, moe):
    """Elements of the routed experts that a token does not visit."""
    experts = size(moe_params["experts_gate_up"], moe_params["experts_down"])
    return experts * (moe.n_routed_experts - moe.n_activated_experts) // moe.n_routed_experts


def counts(config):
    """(main, MTP, activated) as in `PUBLISHED`."""
    (main, main_mtp), (bias, bias_mtp) = map(split_mtp, shapes(config))
    total = size(main, bias)
    activated = total - size(main["embed"]) - idle_experts(main["moe_layers"]["moe"], config.model.moe)
    return total, size(main_mtp, bias_mtp), activated


def test_there_are_configs():
    assert {"tiny", "small_moe", *PUBLISHED} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_builds_hashes_and_survives_json(name):
    config = load(name)
    assert isinstance(config, Config)
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    assert hash(config) == hash(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_its_vocabulary_and_batches_fit(name):
    config = load(name)
    assert config.data.bpe_vocab_size <= config.model.vocab_size
    for phase in config.train.batch_size:
        assert phase.start % config.train.batch_increment == phase.end % config.train.batch_increment == 0


@pytest.mark.parametrize("name", NAMES)
def test_its_header_gives_source_and_command(name):
    header = FILES[NAMES.index(name)].read_text().split('"""')[1]
    assert "\nSource: " in header and f"--config=configs/{name}.py" in header


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    """The published totals count one selection bias per routed expert of every MoE layer."""
    assert counts(load(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", [*PUBLISHED, "small_moe"])
def test_the_header_states_the_exact_counts(name):
    header = FILES[NAMES.index(name)].read_text().split('"""')[1]
    assert all(f"{count:,}" in header for count in counts(load(name)) if count > 0)


def test_small_models_are_as_small_as_they_say():
    total, mtp, activated = counts(load("small_moe"))
    assert 0.95e9 < total < 1.05e9 and 0.15e9 < activated < 0.25e9 and mtp < 0.15 * total
    total, _, activated = counts(load("tiny"))
    assert 3e6 < total < 4e6 and activated < 0.6 * total


def test_deepseek_v3_part_by_part():
    """Every line of the derivation from the architecture table (d = 7168, 128 heads, ranks 1536 and 512)."""
    config = load("deepseek_v3_671b")
    params, routing = shapes(config)
    moe_layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["moe_layers"])
    attention, moe = moe_layer["attn"], moe_layer["moe"]
    assert size([attention[name] for name in ("q_a", "q_b", "kv_a", "kv_b", "o")]) == 187_105_280
    assert size(attention["q_norm"], attention["kv_norm"]) == 2_048
    assert size(attention["norm"], moe["norm"]) == 14_336
    assert size(params["dense_layers"]["mlp"]) - 3 * 7168 == 3 * 396_361_728
    assert size(moe["experts_gate_up"], moe["experts_down"]) == 256 * 44_040_192
    assert size(moe["shared_gate_up"], moe["shared_down"]) == 44_040_192
    assert size(moe["gate"]) == 1_835_008
    assert size(moe_layer) + 256 == 11_507_286_272
    assert size(params["embed"]) == size(params["head"]) == 926_679_040
    assert size(params["mtp_0"]["eh_proj"]) == 102_760_448
    main, main_routing = split_mtp(params)[0], split_mtp(routing)[0]
    assert size(main) == 671_026_404_352
    assert size(main_routing) == 58 * 256
    assert size(main, main_routing, params["mtp_0"], routing["mtp_0"]) + 2 * 926_679_040 == 684_489_845_504
    _, _, activated = counts(config)
    assert activated + 926_679_040 == 37_552_297_472
    assert activated - 926_679_040 == 35_698_939_392


def test_layers_are_stacked_and_masters_are_float32():
    params, routing = shapes(load("deepseek_v3_671b"))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["dense_layers"])} == {3}
    assert {leaf.shape[0] for leaf in jax.tree.leaves([params["moe_layers"], routing["moe_layers"]])} == {58}
    chex.assert_type(jax.tree.leaves([params, routing]), jnp.float32)
