"""A Hugging Face `config.json` of the DeepSeek family <-> `ModelConfig`, by tables: nothing is ignored in silence."""

import copy
from collections.abc import Mapping
from typing import Any

from dsv3.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, YarnConfig, differences, require, to_dict

SAME_NUMBERS = {
    "vocab_size": "vocab_size", "hidden_size": "dim", "intermediate_size": "inter_dim", "num_hidden_layers": "n_layers",
    "first_k_dense_replace": "n_dense_layers", "rms_norm_eps": "norm_eps", "initializer_range": "init_std",
    "num_attention_heads": "attention.n_heads", "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank", "qk_nope_head_dim": "attention.qk_nope_head_dim",
    "qk_rope_head_dim": "attention.qk_rope_head_dim", "v_head_dim": "attention.v_head_dim",
    "rope_theta": "attention.rope_theta", "n_routed_experts": "moe.n_routed_experts",
    "n_shared_experts": "moe.n_shared_experts", "num_experts_per_tok": "moe.n_activated_experts",
    "n_group": "moe.n_expert_groups", "topk_group": "moe.n_limited_groups",
    "moe_intermediate_size": "moe.moe_inter_dim", "scoring_func": "moe.score_func",
    "norm_topk_prob": "moe.norm_topk_prob", "routed_scaling_factor": "moe.route_scale",
    "num_nextn_predict_layers": "mtp.depth", "torch_dtype": "dtype",
}
"""Key there -> field here, with the same value."""

SAME_YARN = {
    "factor": "factor", "original_max_position_embeddings": "original_seq_len", "beta_fast": "beta_fast",
    "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim",
}
"""The same inside `rope_scaling`."""

MUST_BE = {
    "hidden_act": "silu", "moe_layer_freq": 1, "attention_bias": False, "attention_dropout": 0.0,
    "tie_word_embeddings": False, "pretraining_tp": 1, "rope_interleave": True, "mlp_bias": False,
}
"""What this model has no field for, and always does."""

METADATA = frozenset({
    "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "eos_token_id", "ep_size", "max_position_embeddings",
    "model_type", "_name_or_path", "output_router_logits", "pad_token_id", "seq_aux", "transformers_version",
    "use_cache",
})
"""Keys that say nothing about the outputs of the model."""

V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
V2 = {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1}
ABSENT = {"deepseek_v3": V3, "kimi_k2": V3, "deepseek_v2": V2}
"""Model type -> what the released code does where a key is missing (or null), because it knows no other way."""

GATES = {("sigmoid", "noaux_tc"): True, ("softmax", "greedy"): False, ("softmax", "group_limited_greedy"): False}
"""Scoring and choice of experts -> whether there is a selection bias."""

LATENT_NORM_EPS = 1e-6
"""Of the norms of the latents in the released code, which does not read it from `config.json`."""

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def is_fp8(hf: Mapping[str, Any]) -> bool:
    """Whether a `config.json` announces E4M3 weights. Raises `UserError` for any other quantisation."""
    quantization = hf.get("quantization_config")
    if quantization is None:
        return False
    require(isinstance(quantization, Mapping), f"quantization_config is {quantization!r}; expected an object")
    wrong = {key: value for key, value in quantization.items() if key != "scale_fmt" and FP8.get(key) != value}
    missing = set(FP8) - {"activation_scheme", "fmt"} - set(quantization)
    require(not wrong and not missing and quantization.get("scale_fmt") in (None, "float", "ue8m0"),
            f"quantization_config is {dict(quantization)}; expected {FP8}: convert the checkpoint to bfloat16 first")
    return True


def to_model_config(hf: Mapping[str, Any], *, remat: str = "report", scan_unroll: int = 1) -> ModelConfig:
    """The model that a `config.json` describes; `remat` and `scan_unroll` change nothing that it computes.

    Raises `UserError` for a missing key, a key that is not understood, and mathematics that this model does not have.
    """
    model_type = hf.get("model_type")
    require(model_type in ABSENT, f"model_type is {model_type!r}; expected one of {', '.join(ABSENT)}")
    is_fp8(hf)
    values = {key: value for key, value in hf.items() if value is not None}
    values = _without_rope(values) | ABSENT[model_type] | {"num_nextn_predict_layers": 0} | values | _rope(hf)
    if "dtype" in values:
        values.setdefault("torch_dtype", values["dtype"])
    if "n_shared_experts" in hf:
        values.setdefault("n_shared_experts", 0)  # null is none of them
    _check_keys(hf, values)
    selection_bias = _check_gate(model_type, values)
    fields: dict[str, Any] = {
        "attention": {"yarn": values["yarn"], "norm_eps": LATENT_NORM_EPS}, "moe": {"selection_bias": selection_bias},
        "mtp": {"eh_order": "embedding_first", "hidden": "post_norm"}, "remat": remat, "scan_unroll": scan_unroll}
    for key, field in SAME_NUMBERS.items():
        *group, name = field.split(".")
        (fields[group[0]] if group else fields)[name] = values.get(key)
    return ModelConfig(**fields | {
        "attention": AttentionConfig(**fields["attention"]), "moe": MoEConfig(**fields["moe"]),
        "mtp": MTPConfig(**fields["mtp"])})


def to_hf_config(config: ModelConfig, base: Mapping[str, Any] | None = None, *, fp8: bool = False) -> dict[str, Any]:
    """The published form of `config.json`, for weights in E4M3 if `fp8`.

    `base` gives the keys that `ModelConfig` has not: the original of an imported model, of which only what has changed
    is written anew, or the token ids and lengths of a model trained here. Raises `UserError` for a model that the
    released code cannot express.
    """
    base = dict(base or {})
    changed = _published(config)
    if "num_hidden_layers" in base:
        old = _published(to_model_config(base))
        changed = {key: value for key, value in changed.items() if old[key] != value}
        if "rope_parameters" in base:
            changed |= {key: old[key] for key in ("rope_theta", "rope_scaling") if key not in changed}
    else:
        v2 = config.moe.score_func == "softmax"
        changed |= {"model_type": "deepseek_v2" if v2 else "deepseek_v3", "use_cache": True,
                    "architectures": ["DeepseekV2ForCausalLM" if v2 else "DeepseekV3ForCausalLM"]}
    drop = {"rope_parameters"} | ({"dtype"} if "torch_dtype" in changed else set())
    drop |= set() if fp8 else {"quantization_config"}
    result = {key: value for key, value in base.items() if key not in drop} | changed
    if fp8:
        result.setdefault("quantization_config", copy.deepcopy(FP8))
    if "num_hidden_layers" not in base:
        result = dict(sorted(result.items()))
    again = to_model_config(result, remat=config.remat, scan_unroll=config.scan_unroll)
    unlike = differences(to_dict(config), to_dict(again))
    require(not unlike, "the released model code cannot express this model; here and there: " + "; ".join(unlike))
    return result


def _published(config: ModelConfig) -> dict[str, Any]:
    """Every key that describes the mathematics, as the released files write it."""
    fields = to_dict(config)
    result: dict[str, Any] = dict(MUST_BE) | {"num_key_value_heads": config.attention.n_heads}
    for key, field in SAME_NUMBERS.items():
        *group, name = field.split(".")
        result[key] = (fields[group[0]] if group else fields)[name]
    result["n_shared_experts"] = result["n_shared_experts"] or None
    yarn = fields["attention"]["yarn"]
    result["rope_scaling"] = yarn and {key: yarn[name] for key, name in SAME_YARN.items()} | {"type": "yarn"}
    grouped = "greedy" if config.moe.n_expert_groups == 1 else "group_limited_greedy"
    result["topk_method"] = "noaux_tc" if config.moe.selection_bias else grouped
    del result["rope_interleave"], result["mlp_bias"]  # only newer code knows these keys
    return result


def _check_keys(hf: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Every key is understood, and every one that is needed is there."""
    implied = {
        "num_key_value_heads": "num_attention_heads", "head_dim": "qk_rope_head_dim",
        "num_local_experts": "n_routed_experts"}
    known = {*SAME_NUMBERS, *MUST_BE, *METADATA, *implied, "qk_head_dim", "dtype", "topk_method", "rope_scaling",
             "rope_parameters", "quantization_config"}
    unknown = sorted(key for key in set(hf) - known if hf[key] is not None)
    require(not unknown, f"config.json has {', '.join(f'{key}={str(hf[key])[:60]}' for key in unknown)}, which is not "
            "understood and may change what the model computes; remove what is known not to")
    missing = sorted(key for key in SAME_NUMBERS if key not in values and key not in hf)
    require(not missing, f"config.json lacks {', '.join(missing)}")
    for key, value in MUST_BE.items():
        require(values.get(key, value) == value, f"config.json has {key}={values.get(key)!r}; this model has {value!r}")
    for key, other in implied.items():
        require(values.get(key, values[other]) == values[other],
                f"config.json has {key}={values.get(key)!r}; expected {other}={values[other]!r}")
    head_dim = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    require(values.get("qk_head_dim", head_dim) == head_dim,
            f"config.json has qk_head_dim={values.get('qk_head_dim')!r}; its parts add up to {head_dim}")


def _check_gate(model_type: str, values: Mapping[str, Any]) -> bool:
    """Whether there is a selection bias; the mathematics of routing is one that this model has."""
    gate = values["scoring_func"], values["topk_method"]
    require(gate in GATES, f"config.json has scoring_func={gate[0]!r} with topk_method={gate[1]!r}; expected one of "
            + ", ".join(f"{scoring} with {method}" for scoring, method in GATES))
    require((model_type == "deepseek_v2") == (gate[0] == "softmax"),
            f"config.json has model_type={model_type!r} with scoring_func={gate[0]!r}, which its code does not do")
    require(gate[1] != "greedy" or (values["n_group"], values["topk_group"]) == (1, 1),
            f"config.json has topk_method='greedy' with n_group={values['n_group']} and topk_group="
            f"{values['topk_group']}, which greedy ignores; set both to 1, or group_limited_greedy")
    # With top-1 the released code skips the normalisation; V2's then also leaves routed_scaling_factor out.
    normalised = values.get("norm_topk_prob")
    require(not normalised or (model_type != "deepseek_v2" and values.get("num_experts_per_tok") != 1),
            "config.json has norm_topk_prob=true, which the released code of this model type (or of one expert a "
            "token) computes in another way; this model does not")
    return GATES[gate]


def _without_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("rope_theta", "rope_scaling", "rope_parameters")}


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `yarn`, from the published keys or from the newer `rope_parameters`."""
    scaling, parameters = hf.get("rope_scaling"), hf.get("rope_parameters")
    require(scaling is None or parameters is None,
            "config.json has both rope_scaling and rope_parameters; keep one of them")
    given = scaling if parameters is None else parameters
    require(given is None or isinstance(given, Mapping), f"config.json describes RoPE as {given!r}; expected an object")
    given = {key: value for key, value in (given or {}).items() if value is not None}
    thetas = [values["rope_theta"] for values in (hf, given) if values.get("rope_theta") is not None]
    require(len(thetas) > 0, "config.json lacks rope_theta")
    require(len(set(thetas)) == 1, f"config.json gives rope_theta twice, as {thetas}")
    kinds = {given.get(key, "default") for key in ("type", "rope_type") if key in given or len(given) == 0}
    require(kinds in ({"default"}, {"yarn"}) or (not kinds and set(given) <= {"rope_theta"}),
            f"config.json has RoPE of type {', '.join(map(str, kinds)) or 'none'}; expected yarn, or default")
    yarn = kinds == {"yarn"}
    known = {"type", "rope_type", "rope_theta", "truncate"} | (set(SAME_YARN) if yarn else set())
    unknown = sorted(set(given) - known)
    require(not unknown and given.get("truncate", True) is True,
            f"config.json describes RoPE with {', '.join(unknown) or 'truncate'}, which is not understood")
    return {"rope_theta": thetas[0], "yarn": _yarn(given) if yarn else None}


def _yarn(given: Mapping[str, Any]) -> YarnConfig:
    """YaRN, with what the released code takes for missing keys.

    Without `mscale` and `mscale_all_dim` cosines and sines grow by 0.1 ln(factor) + 1 and the softmax scale does not:
    1 and 0. With only one of them (or one of them 0) the released code and transformers disagree.
    """
    missing = sorted({"factor", "original_max_position_embeddings"} - set(given))
    require(not missing, f"config.json describes YaRN without {', '.join(missing)}")
    given = {"beta_fast": 32.0, "beta_slow": 1.0} | dict(given)
    pair = given.get("mscale"), given.get("mscale_all_dim")
    pair = (1.0, 0.0) if pair == (None, None) else pair
    require(pair == (1.0, 0.0) or all(pair), f"config.json describes YaRN with mscale={pair[0]} and mscale_all_dim="
            f"{pair[1]}, for which programs disagree; give both, not zero, or neither")
    given |= {"mscale": pair[0], "mscale_all_dim": pair[1]}
    return YarnConfig(**{name: given[key] for key, name in SAME_YARN.items()})
