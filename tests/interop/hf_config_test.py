"""config.json both ways: the released files, every key that changes the mathematics, and what must be refused."""

import copy
import dataclasses
import json

import pytest
from hf_models import NAMES, ours, published
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILY, model_config

from dsv3.config import UserError, YarnConfig
from dsv3.interop.hf_config import is_fp8, to_hf_config, to_model_config
from dsv3.model.rope import amplitude, softmax_scale

NOT_MODELS = {"mtp_hidden_first_pre_norm"}  # of FAMILY: no released code computes it


@pytest.mark.parametrize("name", NAMES)
def test_a_released_configuration_is_the_one_in_configs(name):
    """But for the standard deviation of initial weights, which is the report's here, and V3's YaRN, a later phase."""
    expected = dataclasses.replace(ours(name), init_std=0.02)
    if name == "deepseek_v3_671b":
        yarn = YarnConfig(factor=40.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0,
                          mscale_all_dim=1.0)
        expected = dataclasses.replace(expected, attention=dataclasses.replace(expected.attention, yarn=yarn))
    assert to_model_config(published(name)) == expected
    assert is_fp8(published(name)) == (name in ("deepseek_v3_671b", "kimi_k2_1t"))


@pytest.mark.parametrize("name", NAMES)
def test_import_then_export_gives_the_same_json(name):
    hf = published(name)
    again = to_hf_config(to_model_config(hf), hf, fp8=is_fp8(hf))
    assert list(again.items()) == list(hf.items())


@pytest.mark.parametrize("name", FAMILY)
def test_export_then_import_gives_the_same_model(name):
    config = FAMILY[name]
    if name in NOT_MODELS:
        with pytest.raises(UserError, match="mtp.eh_order: 'hidden_first' != 'embedding_first'; mtp.hidden"):
            to_hf_config(config)
        return
    for fp8 in (False, True):
        hf = json.loads(json.dumps(to_hf_config(config, {"max_position_embeddings": 12, "bos_token_id": 7}, fp8=fp8)))
        assert to_model_config(hf, remat=config.remat) == config
        assert (hf["max_position_embeddings"], hf["bos_token_id"], is_fp8(hf)) == (12, 7, fp8)


def test_a_changed_model_keeps_the_keys_of_its_origin():
    hf = published()
    model = to_model_config(hf)
    changed = dataclasses.replace(model, dtype="float32", attention=dataclasses.replace(model.attention, yarn=None))
    again = to_hf_config(changed, hf)
    differ = {key for key in hf.keys() | again.keys() if hf.get(key) != again.get(key)}
    assert differ == {"torch_dtype", "rope_scaling", "quantization_config"}
    assert again["torch_dtype"] == "float32" and again["rope_scaling"] is None and "quantization_config" not in again


def test_a_scale_format_survives():
    """V3.1 announces power-of-two scales."""
    hf = published()
    hf["quantization_config"]["scale_fmt"] = "ue8m0"
    assert to_hf_config(to_model_config(hf), hf, fp8=True) == hf


def newer(hf):
    """As newer code writes it: one object for RoPE, `dtype`, derived sizes."""
    hf = copy.deepcopy(hf)
    rope = {"rope_theta": hf.pop("rope_theta"), "rope_type": "default"}
    if scaling := hf.pop("rope_scaling", None):
        rope |= {"rope_type": scaling.pop("type")} | scaling
    return hf | {"rope_parameters": rope, "dtype": hf.pop("torch_dtype"), "rope_interleave": True,
                 "head_dim": hf["qk_rope_head_dim"],
                 "qk_head_dim": hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]}


@pytest.mark.parametrize("name", NAMES)
def test_the_newer_form_is_the_same_model_and_is_written_in_the_published_form(name):
    hf = published(name)
    model = to_model_config(newer(hf))
    assert model == to_model_config(hf)
    again = to_hf_config(model, newer(hf), fp8=is_fp8(hf))
    assert "rope_parameters" not in again
    assert (again["rope_theta"], again["rope_scaling"]) == (hf["rope_theta"], hf.get("rope_scaling"))
    assert to_model_config(again) == model


def test_what_newer_code_leaves_out_is_what_it_always_does():
    hf = published(scoring_func=..., topk_method=..., moe_layer_freq=..., pretraining_tp=...)
    assert to_model_config(hf) == to_model_config(published())
    hf = published("deepseek_v2_lite_16b", scoring_func=..., topk_method=..., n_group=None, topk_group=None)
    assert to_model_config(hf) == to_model_config(published("deepseek_v2_lite_16b"))


def test_no_shared_expert_and_no_query_compression_are_null():
    hf = published(n_shared_experts=None, q_lora_rank=None)
    model = to_model_config(hf)
    assert (model.moe.n_shared_experts, model.attention.q_lora_rank) == (0, None)
    assert to_hf_config(model, hf, fp8=True) == hf


def yarn(**changes):
    scaling = published()["rope_scaling"] | changes
    return {"rope_scaling": {key: value for key, value in scaling.items() if value is not ...}}


def test_yarn_without_mscale_grows_cosines_and_not_the_softmax_scale():
    """0.1 ln 40 + 1 = 1.3688879 on cosines and sines, as the released code and transformers both have it."""
    model = to_model_config(published(**yarn(mscale=..., mscale_all_dim=...)))
    assert amplitude(model.attention) == pytest.approx(1.3688879)
    assert softmax_scale(model.attention) == pytest.approx(192**-0.5)
    assert to_hf_config(model)["rope_scaling"]["mscale_all_dim"] == 0


def test_yarn_without_betas_has_32_and_1():
    assert to_model_config(published(**yarn(beta_fast=..., beta_slow=...))) == to_model_config(published())


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="llama"), "model_type is 'llama'; expected one of deepseek_v3"),
    (dict(model_type=...), "model_type is None"),
    (dict(model_type="deepseek_v32"), "model_type is 'deepseek_v32'"),
    (dict(index_topk=2048), "index_topk=2048, which is not understood"),
    (dict(sliding_window=4096), "sliding_window=4096, which is not understood"),
    (dict(hidden_act="gelu"), "hidden_act='gelu'; this model has 'silu'"),
    (dict(moe_layer_freq=2), "moe_layer_freq=2"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(attention_dropout=0.1), "attention_dropout=0.1"),
    (dict(tie_word_embeddings=True), "tie_word_embeddings=True"),
    (dict(pretraining_tp=2), "pretraining_tp=2"),
    (dict(rope_interleave=False), "rope_interleave=False"),
    (dict(num_key_value_heads=8), "num_key_value_heads=8; expected num_attention_heads=128"),
    (dict(head_dim=128), "head_dim=128; expected qk_rope_head_dim=64"),
    (dict(qk_head_dim=128), "qk_head_dim=128; its parts add up to 192"),
    (dict(kv_lora_rank=...), "lacks kv_lora_rank"),
    (dict(q_lora_rank=...), "lacks q_lora_rank"),
    (dict(n_shared_experts=...), "lacks n_shared_experts"),
    (dict(rope_theta=...), "lacks rope_theta"),
    (dict(torch_dtype=...), "lacks torch_dtype"),
    (dict(torch_dtype="float16"), "dtype is 'float16'"),
    (dict(hidden_size="7168"), "dim is '7168'"),
    (dict(hidden_size=None), "dim is None"),
    (dict(scoring_func="softmax"), "scoring_func='softmax' with topk_method='noaux_tc'"),
    (dict(topk_method="greedy"), "scoring_func='sigmoid' with topk_method='greedy'"),
    (dict(scoring_func="softmax", topk_method="group_limited_greedy"), "model_type='deepseek_v3' with"),
    (dict(num_experts_per_tok=1), "norm_topk_prob=true"),
    (dict(n_group=7), "not divisible"),
    (dict(rope_parameters={"rope_theta": 1e4, "rope_type": "default"}), "both rope_scaling and rope_parameters"),
    (yarn(type="linear"), "RoPE of type linear"),
    (yarn(rope_type="default"), "RoPE of type"),
    (yarn(type=...), "RoPE of type none"),
    (yarn(attention_factor=1.2), "attention_factor, which is not understood"),
    (yarn(truncate=False), "truncate, which is not understood"),
    (yarn(factor=...), "YaRN without factor"),
    (yarn(original_max_position_embeddings=...), "YaRN without original_max_position_embeddings"),
    (yarn(mscale=...), "mscale=None and mscale_all_dim=1.0, for which programs disagree"),
    (yarn(mscale_all_dim=0.0, mscale=0.707), "programs disagree"),
    (yarn(rope_theta=5), "rope_theta twice"),
    (dict(rope_scaling="yarn"), "expected an object"),
    (dict(quantization_config={"quant_method": "awq", "bits": 4}), "convert the checkpoint to bfloat16"),
    (dict(quantization_config=dict(published()["quantization_config"], weight_block_size=[64, 64])), "weight_block"),
    (dict(quantization_config=dict(published()["quantization_config"], fmt="e5m2")), "e5m2"),
    (dict(quantization_config={"quant_method": "fp8"}), "expected"),
    (dict(quantization_config=dict(published()["quantization_config"], scale_fmt="x")), "scale_fmt"),
    (dict(quantization_config=dict(published()["quantization_config"], modules_to_not_convert=["o_proj"])), "modules"),
])
def test_what_is_not_understood_is_an_error(changes, message):
    with pytest.raises(UserError, match=message):
        to_model_config(published(**changes))


@pytest.mark.parametrize("changes, message", [
    (dict(norm_topk_prob=True), "norm_topk_prob=true"),
    (dict(n_group=4, topk_group=2), "which greedy ignores"),
    (dict(scoring_func="sigmoid", topk_method="noaux_tc"), "model_type='deepseek_v2' with"),
])
def test_what_v2_code_does_not_do_is_an_error(changes, message):
    with pytest.raises(UserError, match=message):
        to_model_config(published("deepseek_v2_lite_16b", **changes))


@pytest.mark.parametrize("moe", [
    dict(selection_bias=False), dict(score_func="softmax"), dict(score_func="softmax", selection_bias=False),
    dict(n_activated_experts=1)])
def test_a_model_that_no_released_code_computes_is_not_exported(moe):
    with pytest.raises(UserError):
        to_hf_config(model_config(moe=moe))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.data())
def test_every_key_that_is_not_metadata_counts(name, data):
    """Changing or removing any one of the mathematical keys changes the model or is an error."""
    hf, metadata = published(name), {
        "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "eos_token_id", "ep_size",
        "max_position_embeddings", "seq_aux", "transformers_version", "use_cache", "quantization_config"}
    key = data.draw(st.sampled_from(sorted(set(hf) - metadata)))
    value = hf[key]
    other = {bool: lambda: not value, int: lambda: value + 2, float: lambda: value + 0.5, str: lambda: value + "x",
             type(None): lambda: 64, dict: lambda: value | {"factor": 2.0}}[type(value)]()
    try:
        assert to_model_config(hf | {key: other}) != to_model_config(hf)
    except UserError:
        pass
