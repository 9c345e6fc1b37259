"""Loading and exporting in memory: exact, streamed, sharded; FP8 kept bit for bit; and what must be refused."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_models import RAGGED, rewrite, tensors
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_models import FAMILY, distance, mesh_of, model_config, random_batch, random_variables, transformer

from dsv3.config import UserError
from dsv3.interop import load as load_module
from dsv3.interop.export import export, flatten
from dsv3.interop.load import common, load
from dsv3.interop.safetensors import Reader
from dsv3.parallel.mesh import zero_spec
from dsv3.quant.blocks import Blocks
from experiments.benchmark_import import write_fp8

EXPRESSIBLE = sorted(set(FAMILY) - {"mtp_hidden_first_pre_norm"})


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A released checkpoint in miniature: E4M3 with ragged blocks, MTP, several files."""
    directory = tmp_path_factory.mktemp("fp8") / "hf"
    write_fp8(directory, RAGGED, seed=3, file_bytes=400_000)
    return directory


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_float32_goes_out_and_comes_back_as_it_was(name, tmp_path):
    config = FAMILY[name]
    variables = {"routing": {}} | random_variables(config)
    export(config, flatten(variables), tmp_path / "hf", dtype="float32")
    found, again = load(tmp_path / "hf")
    assert dataclasses.replace(found, remat=config.remat) == config
    chex.assert_trees_all_equal(again, variables)


def test_the_transposition_of_every_matrix_is_that_of_the_model(tmp_path):
    """Not only back and forth: HF's y = W x, spelled out for one expert, on the exported tensors."""
    config = model_config()
    variables = random_variables(config)
    export(config, flatten(variables), tmp_path / "hf", dtype="float32")
    reader, moe = Reader(tmp_path / "hf"), variables["params"]["moe_layers"]["moe"]
    x_D = np.random.default_rng(0).standard_normal(config.dim).astype(np.float32)
    expert = "model.layers.2.mlp.experts.5."
    gate, up, down = (reader.read(f"{expert}{part}_proj.weight") for part in ("gate", "up", "down"))
    hidden = (gate @ x_D) / (1 + np.exp(-(gate @ x_D))) * (up @ x_D)
    ours = x_D @ np.asarray(moe["experts_gate_up"][1, 5])
    half = len(ours) // 2
    np.testing.assert_allclose(hidden, ours[:half] / (1 + np.exp(-ours[:half])) * ours[half:], rtol=2e-5)
    np.testing.assert_allclose(down @ hidden, hidden @ np.asarray(moe["experts_down"][1, 5]), rtol=2e-5, atol=1e-6)
    eh_proj = reader.read("model.layers.3.eh_proj.weight")
    assert (eh_proj.T == variables["params"]["mtp_0"]["eh_proj"]).all() and eh_proj.shape == (24, 48)


def test_exported_bfloat16_loads_to_the_rounded_model(tmp_path):
    config = model_config(dtype="bfloat16")
    variables = random_variables(config)
    export(config, flatten(variables), tmp_path / "hf", dtype="bf16")
    assert Reader(tmp_path / "hf").tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"
    _, again = load(tmp_path / "hf")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), variables["params"])
    chex.assert_trees_all_equal(again, {"params": rounded, "routing": variables["routing"]})
    _, narrow = load(tmp_path / "hf", dtype="bfloat16")
    chex.assert_type(jax.tree.leaves(narrow["params"]), jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(narrow["routing"]), jnp.float32)


def test_kept_fp8_goes_out_bit_for_bit(fp8, tmp_path):
    config, variables = load(fp8, dtype=None)
    base = json.loads((fp8 / "config.json").read_text())
    export(config, flatten(variables), tmp_path / "hf", dtype=None, base=base, file_bytes=300_000)
    assert tensors(tmp_path / "hf") == tensors(fp8)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == base
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    kv_a = variables["params"]["moe_layers"]["attn"]["kv_a"]
    assert isinstance(kv_a, Blocks) and kv_a.values.shape == (2, 192, 80) and kv_a.scales.shape == (2, 2, 1)


def test_dequantised_is_value_times_scale_of_its_block(fp8):
    reader, (_, variables) = Reader(fp8), load(fp8)
    for name, leaf in {
        "model.layers.0.self_attn.o_proj.weight": variables["params"]["dense_layers"]["attn"]["o"][0],
        "model.layers.2.mlp.experts.7.up_proj.weight":
            variables["params"]["moe_layers"]["moe"]["experts_gate_up"][1, 7][:, 128:],
        "model.layers.3.self_attn.q_b_proj.weight": variables["params"]["mtp_0"]["block"]["attn"]["q_b"],
    }.items():
        scales = np.kron(reader.read(name + "_scale_inv"), np.ones((128, 128), np.float32))
        values = reader.read(name).astype(np.float32)
        assert (np.asarray(leaf).T == values * scales[:values.shape[0], :values.shape[1]]).all()


def test_fp8_export_is_within_e4m3_of_the_weights_and_the_rest_is_bfloat16(tmp_path):
    variables = random_variables(RAGGED)
    export(RAGGED, flatten(variables), tmp_path / "hf", dtype="fp8")
    _, again = load(tmp_path / "hf")
    attention, near = (tree["params"]["moe_layers"]["attn"] for tree in (variables, again))
    assert 0.01 < distance(near["q_a"], attention["q_a"]) < 0.04
    for path in ("head", "embed"):
        expected = variables["params"][path].astype(jnp.bfloat16)
        assert (again["params"][path] == expected).all()
    chex.assert_trees_all_equal(again["routing"], variables["routing"])


def test_an_exported_model_computes_the_same_logits(tmp_path):
    config = model_config()
    variables, batch = random_variables(config), random_batch(config)
    export(config, flatten(variables), tmp_path / "hf", dtype="float32")
    found, again = load(tmp_path / "hf")
    forward = jax.jit(lambda variables: transformer(config).apply(variables, batch, method="forward"))
    chex.assert_trees_all_equal(forward(variables), forward(again))
    assert dataclasses.replace(found, remat="none") == config


@pytest.mark.parametrize("dtype, host_bytes", [("float32", 2**28), (None, 2**28), (None, 20_000)])
def test_sharded_loading_equals_unsharded_and_reads_no_more(fp8, dtype, host_bytes, monkeypatch):
    """Eight devices, every array divided along its longest even axis: columns, rows, experts or layers."""
    _, whole = load(fp8, dtype=dtype)
    mesh = mesh_of(8)
    spec = lambda leaf: NamedSharding(mesh, zero_spec(P(), leaf.shape, 8))
    monkeypatch.setattr(load_module, "HOST_BYTES", host_bytes)
    read = []
    actual = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, name, index=(): read.append(
        (name, actual(self, name, index))) or read[-1][1])
    monkeypatch.setattr(load_module, "check_copies", lambda source: None)
    shardings = jax.tree.map(spec, whole)
    _, divided = load(fp8, dtype=dtype, shardings=shardings)
    chex.assert_trees_all_equal(divided, whole)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, divided), shardings)
    assert len({leaf.sharding.spec for leaf in jax.tree.leaves(divided)}) > 4
    bytes_read = sum(array.nbytes for name, array in read if dtype is None or not name.endswith("_scale_inv"))
    stored = sum(info.stop - info.start for name, info in Reader(fp8).tensors.items()
                 if dtype is None or not name.endswith("_scale_inv"))
    replicated = sum(8 * leaf.nbytes for leaf in jax.tree.leaves(divided) if leaf.sharding.is_fully_replicated)
    assert bytes_read <= stored + replicated


def test_replicas_are_read_once(fp8, monkeypatch):
    count, actual = [], Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, name, index=(): count.append(name) or actual(self, name, index))
    everywhere = NamedSharding(mesh_of(8), P())
    _, alone = load(fp8, dtype=None)
    first = len(count)
    _, variables = load(fp8, dtype=None, shardings=jax.tree.map(lambda leaf: everywhere, alone))
    assert len(count) == 2 * first and jax.tree.leaves(variables)[0].sharding == everywhere


def test_the_common_part_of_two_regions():
    assert common((slice(0, 4), slice(2, 6)), (slice(1, 9), slice(0, 3))) == (slice(1, 4), slice(2, 3))
    assert common((slice(0, 4),), (slice(4, 9),)) is None


def test_rotary_frequencies_that_are_stored_are_checked(tmp_path):
    """Moonlight and Kimi-K2 carry them."""
    config = model_config(mtp=dict(depth=0))
    export(config, flatten(random_variables(config)), tmp_path / "plain", dtype="float32")
    right = (100.0 ** (-np.arange(4) / 4)).astype(ml_dtypes.bfloat16)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    _, variables = load(rewrite(tmp_path / "plain", tmp_path / "right", lambda arrays: arrays.update({name: right})))
    chex.assert_trees_all_equal(variables, load(tmp_path / "plain")[1])
    with pytest.raises(UserError, match="other frequencies than rope_theta=100.0"):
        load(rewrite(tmp_path / "plain", tmp_path / "wrong", lambda arrays: arrays.update({name: right[::-1]})))


LAST = "model.layers.3.mlp.experts.7.down_proj.weight"
SCALE = LAST + "_scale_inv"


def nan_scale(arrays):
    arrays[SCALE][0, 0] = np.nan


def negative_scale(arrays):
    arrays[SCALE][0, 0] = -1


def other_embedding(arrays):
    arrays["model.layers.3.embed_tokens.weight"][-1, -1] += 1


def other_head(arrays):
    arrays["model.layers.3.shared_head.head.weight"][0, 0] += 1


def put(name, array):
    return lambda arrays: arrays.update({name: array})


@pytest.mark.parametrize("change, message", [
    (lambda arrays: arrays.pop(LAST), f"lacks 1 tensors .* the first is {LAST}"),
    (lambda arrays: arrays.pop(SCALE), f"lacks 1 tensors .* the first is {SCALE}"),
    (lambda arrays: arrays.pop("model.layers.3.eh_proj.weight"), "set num_nextn_predict_layers to 0"),
    (put("model.layers.4.mlp.gate.weight", np.zeros(3, np.float32)), "has 1 tensors that its config.json does not"),
    (put("model.layers.1.self_attn.kv_b_proj.bias", np.zeros(3, np.float32)), "kv_b_proj.bias"),
    (put(SCALE, np.ones((1, 2), np.float32)), r"shape \[1, 2\]; config.json calls for \[2, 1\]"),
    (put(SCALE, np.ones((2, 1), ml_dtypes.bfloat16)), "is BF16; config.json calls for F32"),
    (put(LAST, np.ones((128, 192), ml_dtypes.float8_e4m3fn)), r"shape \[128, 192\]"),
    (put(LAST, np.ones((192, 128), ml_dtypes.bfloat16)), "is BF16; config.json calls for F8_E4M3"),
    (put("lm_head.weight", np.ones((300, 192), np.int32)), "is I32; config.json calls for BF16 or F32 or F16"),
    (put("lm_head.weight", np.ones((300, 192), ml_dtypes.float8_e4m3fn)), "is F8_E4M3; config.json calls for BF16"),
    (nan_scale, f"{SCALE} holds scales that are negative or not finite"),
    (negative_scale, f"{SCALE} holds scales that are negative or not finite"),
    (other_embedding, "layers.3.embed_tokens.weight differs from model.embed_tokens.weight"),
    (other_head, "layers.3.shared_head.head.weight differs from lm_head.weight"),
])
@pytest.mark.parametrize("dtype", ["float32", None])
def test_a_checkpoint_that_is_not_whole_is_an_error(fp8, tmp_path, change, message, dtype):
    with pytest.raises(UserError, match=message):
        load(rewrite(fp8, tmp_path / "bad", change), dtype=dtype)


@pytest.mark.parametrize("change, message", [
    (dict(num_hidden_layers=4), "lacks .* tensors that its config.json calls for"),
    (dict(num_hidden_layers=2), "lacks .* tensors that its config.json calls for|does not call for"),
    (dict(num_nextn_predict_layers=0), "does not call for, the first is model.layers.3"),
    (dict(n_routed_experts=16), "lacks"),
    (dict(hidden_size=200), r"shape \[300, 192\]; config.json calls for \[300, 200\]"),
    (dict(q_lora_rank=None), "lacks 8 tensors"),
    (dict(quantization_config=None), "does not call for"),
])
def test_a_configuration_that_contradicts_the_tensors_is_an_error(fp8, tmp_path, change, message):
    copy = rewrite(fp8, tmp_path / "copy", lambda arrays: None)
    hf = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(hf | change))
    with pytest.raises(UserError, match=message):
        load(copy)


def test_mixed_dtypes_of_one_array_are_dequantised_but_not_kept(tmp_path):
    config = model_config()
    export(config, flatten(random_variables(config)), tmp_path / "hf", dtype="bf16")
    mixed = rewrite(tmp_path / "hf", tmp_path / "mixed", lambda arrays: arrays.update({
        "model.layers.2.input_layernorm.weight": np.ones(24, np.float32)}))
    load(mixed)
    with pytest.raises(UserError, match="are BF16, F32, and one array here; import with --dtype"):
        load(mixed, dtype=None)


def test_an_export_never_replaces_and_never_leaves_a_part(tmp_path):
    config = model_config()
    arrays = dict(flatten(random_variables(config)))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export(config, arrays, tmp_path / "there")
    with pytest.raises(UserError, match="--dtype=int4; expected one of bf16"):
        export(config, arrays, tmp_path / "hf", dtype="int4")
    arrays["params", "head"] = None  # fails in the middle of the weights
    with pytest.raises(TypeError):
        export(config, arrays, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
