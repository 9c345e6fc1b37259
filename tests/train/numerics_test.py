"""The monitor on whole models: every product of every layer, whatever the recomputation and the mesh."""

import dataclasses
import json
import struct
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import ONE_LAYER as ONE_LAYER_RUN
from small_runs import small_config, write_corpus
from tensorboardX.proto.event_pb2 import Event
from tiny_models import (
    FAMILY,
    distance,
    mesh_of,
    model_config,
    random_batch,
    random_variables,
    recipe_of,
    train_config,
    transformer,
)

from dsv3.config import Layers, Operand, QuantConfig, Site, UserError
from dsv3.config.quant import RECIPES, SITES
from dsv3.kernels.attention import Heads, rotary_attention
from dsv3.kernels.dot import dot
from dsv3.kernels.fp8_kernels import REFERENCE as KERNELS
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.scaled import decode_tiles
from dsv3.kernels.swiglu import swiglu
from dsv3.kernels.watched import take
from dsv3.model import watching_ops as watching_ops_module
from dsv3.model.fp8_ops import fp8_ops
from dsv3.model.ops import ExpertWeights, reference_ops
from dsv3.model.transformer import Transformer
from dsv3.model.watching_ops import SITES as WATCHED
from dsv3.model.watching_ops import site_of, watching_ops
from dsv3.parallel.mesh import place_local
from dsv3.quant.monitor import OPERANDS, observe_product, rates, zero_statistics
from dsv3.train.loop import train
from dsv3.train.numerics import LIKE, NumericsWriter, numerics, numerics_table
from dsv3.train.step import Knobs, make_gradients

KNOBS = Knobs(*map(np.float32, (1e-2, 0.01, 0.3, 1e-2)))
TRAIN = train_config()
CONFIG = model_config(n_layers=3, n_dense_layers=1)
ONE_LAYER = model_config(n_layers=1, n_dense_layers=0, mtp=dict(depth=0))
RULE = RECIPES["fp8"].rule_of("attn.o")  # all seven operands
COARSE = dataclasses.replace(RULE, dgrad_dy=Operand(format="e5m2", tile="tensor", power_of_two=False))
observed = jax.jit(observe_product, static_argnums=0)
REFERENCE = reference_ops(row_block=4, loss_chunk=8)


EVERYWHERE = QuantConfig(default=COARSE, sites=(), layers=(), swiglu_kept=None)


def only(rule, *sites):
    """`rule` at these sites and none at the others."""
    return QuantConfig(default=rule, layers=(), swiglu_kept=None, sites=(
        *(Site(pattern=site, rule=rule) for site in sites), Site(pattern="*", rule=None)))


def watching(config, recipe=EVERYWHERE, quantized=False):
    return Transformer(config, watching_ops(recipe, quantized=quantized, loss_chunk=8))


def batches(config, rows=2, n_micro=1):
    return jax.tree.map(lambda a: np.asarray(a).reshape(n_micro, rows, -1), random_batch(config, rows * n_micro))


def records_of(config, quant=EVERYWHERE, n_devices=1, quantized=False, **batch):
    variables = random_variables(config)
    recipe = recipe_of(watching(config, quant, quantized), TRAIN, n_devices)
    return numerics(recipe, variables["params"], variables.get("routing", {}), batches(config, **batch), KNOBS)


def by_name(records):
    named = {(r["layer"], r["site"], r["operand"]): r for r in records}
    assert len(named) == len(records)
    return named


@pytest.fixture(scope="module")
def o_records():
    """Of the projection after attention in every layer."""
    return records_of(ONE_LAYER, only(COARSE, "attn.o"))


def sums_of_squares(rule, x, w, d_y, wgrad_x=None, wgrad_dy=None):
    """In place of what `observe_product` measures: quick to compile, and told apart by layer, site and operand."""
    for_wgrad = x if wgrad_x is None else wgrad_x, d_y if wgrad_dy is None else wgrad_dy
    sums = zip(OPERANDS, (x, w, d_y, w, *for_wgrad, x), strict=True)
    return {name: zero_statistics()._replace(elements=jnp.float32(array.size), square=jnp.sum(array ** 2),
                                             error_square=jnp.sum(array ** 4)) for name, array in sums}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watching_ops_module, "observe_product", sums_of_squares)


def listening(linear):
    """The reference with `linear(site, x, w)` for every product but those of the routed experts."""
    def attention_linear(site, q, kv, k_rope, rotation, w, *, scale, segment_ids_BT):
        o_BTHU = rotary_attention(Heads(q, kv, k_rope), rotation, scale, segment_ids_BT)
        return linear(site, o_BTHU.reshape(*o_BTHU.shape[:2], -1), w)

    return dataclasses.replace(
        REFERENCE, linear=linear, attention_linear=attention_linear,
        mlp=lambda sites, x, gate_up, down: linear(sites[1], swiglu(linear(sites[0], x, gate_up)), down),
        norm_linear=lambda sites, x, gain, weights, eps: tuple(
            linear(site, rms_norm(x, gain, eps), w) for site, w in zip(sites, weights, strict=True)))


def sites_called(config):
    """What a bundle hears while the model is built, without arithmetic."""
    heard = set()

    def linear(site, x, w):
        heard.add(site)
        return REFERENCE.linear(site, x, w)

    def experts(*args):
        heard.update(("experts.gate_up", "experts.down"))
        return REFERENCE.moe(*args)

    ops = dataclasses.replace(listening(linear), moe=experts)
    variables = jax.eval_shape(Transformer(config, ops).init, jax.random.key(0), random_batch(config))
    return heard, variables["params"]


@pytest.mark.parametrize("name", ["v3", "no_query_compression", "all_dense_trunk", "mtp_depth_two", "no_shared_expert"])
def test_every_site_of_a_model_has_its_parameter_and_no_other_has(name):
    heard, params = sites_called(FAMILY[name])
    paths = [tuple(key.key for key in path if hasattr(key, "key")) for path, _ in jax.tree.leaves_with_path(params)]
    assert {site_of(path) for path in paths} - {None} == heard
    unwatched = {path[-1] for path in paths if site_of(path) is None}
    assert all(name.endswith("norm") or name in ("embed", "head", "gate") for name in unwatched)


@pytest.mark.slow
def test_every_layer_site_and_operand_has_one_record(quick):
    found = by_name(records_of(CONFIG))
    attention = {f"attn.{name}" for name in ("q_a", "q_b", "kv_a", "kv_b", "o")}
    dense = {"mlp.gate_up", "mlp.down"}
    experts = {f"{part}.{name}" for part in ("shared", "experts") for name in ("gate_up", "down")}
    expected = {("dense_layers.0", site) for site in attention | dense}
    expected |= {(f"moe_layers.{layer}", site) for layer in (0, 1) for site in attention | experts}
    expected |= {("mtp_0", site) for site in attention | experts | {"mtp.eh_proj"}}
    assert set(found) == {(*place, operand) for place in expected for operand in OPERANDS}
    assert found["moe_layers.0", "attn.q_a", "fprop_w"] != found["moe_layers.1", "attn.q_a", "fprop_w"]


def captured(config):
    """The operands of every product of a model without watching, carried out by callbacks: site -> [(x, w, d_y)]."""
    heard = {}

    def listen(site):
        @jax.custom_vjp
        def run(x, w):
            return dot(x, w)

        def backward(residuals, d_y):
            jax.debug.callback(lambda *arrays: heard.setdefault(site, []).append(arrays), *residuals, d_y)
            return jax.vjp(dot, *residuals)[1](d_y)

        run.defvjp(lambda x, w: (dot(x, w), (x, w)), backward)
        return run

    ops = listening(lambda site, x, w: listen(site)(x, w))
    variables = random_variables(config)
    run = jax.jit(make_gradients(recipe_of(Transformer(config, ops), TRAIN)))
    jax.block_until_ready(run(variables["params"], variables["routing"],
                              place_local(mesh_of(), batches(config)), KNOBS))
    jax.effects_barrier()
    return heard


@pytest.mark.slow
def test_figures_are_those_of_the_operands_themselves():
    """Tensors taken out of an unwatched step another way, measured one by one."""
    sites = ("attn.q_a", "attn.kv_b", "attn.o", "shared.down")
    found = by_name(records_of(ONE_LAYER, only(COARSE, "shared.gate_up", *sites)))
    products = captured(ONE_LAYER)
    assert len(products) == 7 and all(len(calls) == 1 for calls in products.values())
    for site in sites:
        [(x, w, d_y)] = products[site]
        for operand, statistics in observed(COARSE, x, w, d_y).items():
            ours, theirs = found["moe_layers.0", site, operand], rates(statistics)
            assert {name: ours[name] for name in theirs if name not in ("error", "underflow")} == {
                name: theirs[name] for name in theirs if name not in ("error", "underflow")}, (site, operand)
            np.testing.assert_allclose(ours["error"], theirs["error"], rtol=1e-3)
            np.testing.assert_allclose(ours["underflow"], theirs["underflow"], atol=1e-2)


@pytest.mark.slow
def test_a_quantized_run_is_measured_on_its_own_tensors(o_records):
    """By the recipe's own products the tensors differ a little, and the weights not at all."""
    quantized = by_name(records_of(ONE_LAYER, only(COARSE, "attn.o"), quantized=True))
    for name, record in by_name(o_records).items():
        np.testing.assert_allclose(quantized[name]["error"], record["error"], rtol=0.1)
        assert (quantized[name] == record) == (name[2] in ("fprop_w", "dgrad_w", "fprop_x", "wgrad_x", "kept"))


@pytest.mark.slow
def test_recomputation_changes_no_figure(quick):
    """Every operand of a layer that is computed again is the one of the forward pass."""
    one, other = (by_name(records_of(dataclasses.replace(ONE_LAYER, remat=remat))) for remat in ("none", "report"))
    assert one.keys() == other.keys() and len(one) == 9 * len(OPERANDS)
    for name in one:
        np.testing.assert_allclose(other[name]["error"], one[name]["error"], rtol=1e-4)


@pytest.mark.slow
def test_devices_and_micro_batches_add_up(quick):
    """Four rows as one micro-batch on one device, or as one row on each of two devices, twice."""
    one = by_name(records_of(ONE_LAYER, rows=4))
    many = by_name(records_of(ONE_LAYER, rows=2, n_micro=2, n_devices=2))
    for name, record in one.items():
        if not name[1].startswith("experts"):  # those have more padding in smaller batches
            assert many[name]["elements"] == (4 if name[2].endswith("_w") else 1) * record["elements"]
        np.testing.assert_allclose(many[name]["error"], record["error"], rtol=1e-3, err_msg=str(name))


def test_a_site_without_a_rule_has_no_record_and_a_recipe_shows(o_records):
    assert {record["site"] for record in o_records} == {"attn.o"} and len(o_records) == len(OPERANDS)
    fine = dataclasses.replace(RULE, wgrad_x=Operand(format="e5m6", tile="inner", power_of_two=False))
    better = by_name(records_of(ONE_LAYER, only(fine, "attn.o")))
    for name, record in by_name(o_records).items():
        ratio = better[name]["error"] / record["error"]
        if name[2] in ("dgrad_dy", "wgrad_x"):
            assert ratio < {"dgrad_dy": 0.8, "wgrad_x": 0.2}[name[2]], name
        else:
            assert ratio == 1


@pytest.mark.slow
def test_every_layer_is_measured_by_its_own_rules(monkeypatch):
    """One of two MoE layers under one scan has no rule, and only the MTP module has its inputs in another format."""
    def formats(rule, *arrays, **for_wgrad):
        """In place of an error, the bits of the format's mantissa."""
        bits = {"e4m3": 3.0, "e5m2": 2.0, "e5m6": 6.0}
        return {name: zero_statistics()._replace(
            elements=jnp.float32(1), square=jnp.float32(1), error_square=bits[getattr(rule, name).format] ** 2)
            for name in OPERANDS}

    monkeypatch.setattr(watching_ops_module, "observe_product", formats)
    fine = dataclasses.replace(RULE, fprop_x=Operand(format="e5m6", tile="inner", power_of_two=False))
    layers = (Layers(first=1, last=1, sites=(Site(pattern="*", rule=None),)),
              Layers(first=3, last=3, sites=(Site(pattern="attn.*", rule=fine),)))
    quant = dataclasses.replace(EVERYWHERE, layers=layers)
    found = by_name(records_of(CONFIG, quant))
    everywhere = by_name(records_of(CONFIG))
    assert found.keys() == {name for name in everywhere if name[0] != "moe_layers.0"}
    numbers = {"dense_layers.0": 0, "moe_layers.1": 2, "mtp_0": 3}
    for (layer, site, operand), record in found.items():
        rule = quant.of_layer(numbers[layer]).rule_of(site)
        assert record["error"] == {"e4m3": 3, "e5m2": 2, "e5m6": 6}[getattr(rule, operand).format]
    assert found["mtp_0", "attn.o", "fprop_x"]["error"] == 6 != found["mtp_0", "shared.down", "fprop_x"]["error"]


@pytest.mark.slow
def test_layers_with_the_rules_they_had_are_measured_as_before(quick):
    """Of the tensors of a quantised run, with the scan cut in two."""
    config = model_config(n_layers=2, n_dense_layers=2, mtp=dict(depth=0))
    quant, same = only(COARSE, "attn.*"), Layers(first=1, last=1, sites=(Site(pattern="attn.q_a", rule=COARSE),))
    cut = dataclasses.replace(quant, layers=(same,))
    assert len(watching_ops(cut, quantized=True).alike(0, 2)) == 2
    one, other = (by_name(records_of(config, recipe, quantized=True)) for recipe in (quant, cut))
    assert one.keys() == other.keys() and len(one) == 2 * 5 * len(OPERANDS)
    for name in one:
        np.testing.assert_allclose(other[name]["error"], one[name]["error"], rtol=1e-4, err_msg=str(name))


def test_watching_changes_neither_the_losses_nor_any_other_gradient(quick):
    variables = random_variables(ONE_LAYER)
    run = lambda model: jax.jit(make_gradients(recipe_of(model, TRAIN)))(
        variables["params"], variables["routing"], place_local(mesh_of(), batches(ONE_LAYER)), KNOBS)
    (plain, losses), (mail, watched_losses) = run(transformer(ONE_LAYER)), run(watching(ONE_LAYER))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), losses, watched_losses)
    compared = 0
    for (path, leaf), (_, expected) in zip(*map(jax.tree.leaves_with_path, (mail, plain)), strict=True):
        if site_of(tuple(key.key for key in path)) is None:
            assert distance(leaf, expected) < 1e-5, path
            compared += 1
    assert compared == 8  # embedding, head, gate, and five norms


@pytest.mark.slow
def test_experts_are_measured_on_what_a_run_quantises(quick):
    """Tokens and not yet rows, d_y without the gate's weights and h with them, as the run's own kernels hold them."""
    n_tokens, dim, f, n_experts, k = 40, 24, 16, 5, 2
    rng = np.random.default_rng(0)
    topk = jnp.asarray([rng.permutation(n_experts)[:k] for _ in range(n_tokens)])
    h, gate, up, down, d_y = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (
        (n_tokens, dim), (n_tokens, k), (n_experts, dim, 2 * f), (n_experts, f, dim), (n_tokens, dim)))
    held = {}

    def listening_to(name, *operands):
        def run(*arguments):
            results = getattr(KERNELS, name)(*arguments)
            for operand, result in zip(operands, results if type(results) is tuple else (results,), strict=False):
                held.setdefault(operand, []).append(float(jnp.sum(decode_tiles(result) ** 2)))
            return results
        return run

    kernels = KERNELS._replace(
        quantize_rows=listening_to("quantize_rows", "tokens"), swiglu_quantize=listening_to("swiglu_quantize", "h"),
        swiglu_backward_quantize=listening_to("swiglu_backward_quantize", "d_gate_up", "d_gate_up_columns", "wh"),
        requantize_columns=listening_to("requantize_columns", "columns"))

    def pulled(ops):
        run = lambda h, gate, *weights: ops.moe(h, topk, gate, ExpertWeights(*weights))
        return jax.vjp(run, h, gate, up, down)[1](d_y)

    pulled(fp8_ops(RECIPES["fp8"], kernels))
    (x, dy), (x_columns, dy_columns) = held["tokens"], held["columns"]
    expected = {
        2: dict(fprop_x=x, wgrad_x=x_columns, dgrad_dy=held["d_gate_up"][0], wgrad_dy=held["d_gate_up_columns"][0]),
        3: dict(fprop_x=held["h"][0], wgrad_x=held["wh"][0], dgrad_dy=dy, wgrad_dy=dy_columns)}
    gradients = pulled(watching_ops(RECIPES["fp8"], quantized=True))
    for argument, squares in expected.items():
        found = take(gradients[argument], LIKE)
        for operand, square in squares.items():
            np.testing.assert_allclose(found[operand].square, square, rtol=0.03, err_msg=operand)
    assert abs(expected[3]["wgrad_x"] / expected[3]["fprop_x"] - 1) > 0.1  # the gate's weights show
    np.testing.assert_allclose(dy_columns, k * dy, rtol=0.01)


def events(directory):
    """The events of all TensorBoard files under a directory: a record is its length, a checksum, itself, another."""
    found = []
    for path in sorted(directory.rglob("events*")):
        data, place = path.read_bytes(), 0
        while place < len(data):
            length, = struct.unpack_from("<Q", data, place)
            found.append(Event.FromString(data[place + 12:place + 12 + length]))
            place += length + 16
    return found


def test_records_are_lines_and_tensorboard_scalars_and_histograms(tmp_path, o_records):
    records = o_records
    with NumericsWriter(tmp_path, 0) as writer:
        writer.write(10, records)
        writer.write(20, records[:1] + [records[1] | {"error": float("nan")}])
    lines = [json.loads(line) for line in (tmp_path / "numerics.jsonl").read_text().splitlines()]
    assert lines[:len(records)] == [{"step": 10} | record for record in records]
    assert [line["step"] for line in lines[len(records):]] == [20, 20] and lines[-1]["error"] is None
    values = [(event.step, value) for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    scalars = {(step, value.tag): value.simple_value for step, value in values if not value.HasField("histo")}
    name = "moe_layers.0/attn.o.dgrad_dy"
    record = by_name(records)["moe_layers.0", "attn.o", "dgrad_dy"]
    np.testing.assert_allclose(scalars[10, f"error/{name}"], record["error"], rtol=1e-6)
    histograms = {value.tag: value.histo for step, value in values if value.HasField("histo") and step == 10}
    assert len(histograms) == len(records)
    histogram = histograms[f"log2_scale/{name}"]
    assert histogram.num == sum(record["scales"]) == sum(histogram.bucket)
    with NumericsWriter(tmp_path, 10):  # a run that continues from step 10
        pass
    assert Counter(json.loads(line)["step"] for line in (tmp_path / "numerics.jsonl").read_text().splitlines()) == {
        10: len(records)}


def test_the_table_has_a_line_for_every_record(o_records):
    lines = numerics_table(o_records).splitlines()
    assert len(lines) == 2 + len(o_records) and "| moe_layers.0 | attn.o | kept |" in lines[-1]
    assert {line.count("|") for line in lines} == {9}


@pytest.mark.slow
def test_a_run_that_is_measured_is_the_same_run(tmp_path):
    """`numerics_every` writes at its steps, and changes no bit of the state."""
    corpus = write_corpus(tmp_path / "text")
    config = small_config(
        corpus, **ONE_LAYER_RUN, **{"train.steps": "4", "train.eval_every": "4", "train.checkpoint_every": "4"})
    measured = dataclasses.replace(config, train=dataclasses.replace(config.train, numerics_every=2))
    plain = train(config, tmp_path / "plain", REFERENCE)
    watching = watching_ops(only(COARSE, "attn.o"), quantized=False)
    seen = train(measured, tmp_path / "measured", REFERENCE, watching=watching)
    chex.assert_trees_all_equal(plain.state, seen.state)
    lines = [json.loads(line) for line in (tmp_path / "measured" / "numerics.jsonl").read_text().splitlines()]
    assert Counter(line["step"] for line in lines) == {2: len(OPERANDS), 4: len(OPERANDS)}
    assert not (tmp_path / "plain" / "numerics.jsonl").exists()
    with pytest.raises(UserError, match="train.numerics_every is 2, but this program has no bundle that measures"):
        train(measured, tmp_path / "other", REFERENCE)


def test_every_place_of_a_recipe_is_watched():
    assert sorted(WATCHED.values()) == sorted(SITES)
