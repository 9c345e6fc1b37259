"""A published checkpoint of V3's shape as a GGUF file for llama.cpp, float32: names and keys of its `deepseek2`."""

from pathlib import Path

import gguf
import numpy as np

from dsv3.config import ModelConfig
from dsv3.interop.safetensors import Reader

LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output"}
DENSE = {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
MOE = {"mlp.gate": "ffn_gate_inp"} | {
    f"mlp.shared_experts.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")}


def write_gguf(checkpoint: Path, config: ModelConfig, path: Path) -> None:
    """Without MTP modules; with a vocabulary of made-up words, for llama.cpp wants one."""
    writer = gguf.GGUFWriter(str(path), "deepseek2")
    _write_keys(writer, config)
    _write_vocabulary(writer, config.vocab_size)
    reader = Reader(checkpoint)
    read = lambda name: np.ascontiguousarray(reader.read(name), np.float32)
    for there, here in {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}.items():
        writer.add_tensor(f"{there}.weight", read(f"{here}.weight"))
    for layer in range(config.n_layers):
        for name, tensor in _layer(config, f"model.layers.{layer}", read, layer >= config.n_dense_layers).items():
            writer.add_tensor(f"blk.{layer}.{name}", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _layer(config: ModelConfig, prefix: str, read, moe: bool) -> dict[str, np.ndarray]:
    a, m = config.attention, config.moe
    names = LAYER | (MOE if moe else DENSE)
    tensors = {f"{there}.weight": read(f"{prefix}.{here}.weight") for here, there in names.items()}
    kv_b_HXC = read(f"{prefix}.self_attn.kv_b_proj.weight").reshape(a.n_heads, -1, a.kv_lora_rank)
    tensors["attn_k_b.weight"] = kv_b_HXC[:, :a.qk_nope_head_dim].transpose(0, 2, 1)
    tensors["attn_v_b.weight"] = kv_b_HXC[:, a.qk_nope_head_dim:]
    if moe:
        tensors["exp_probs_b.bias"] = read(f"{prefix}.mlp.gate.e_score_correction_bias")
        for name in ("gate", "up", "down"):
            tensors[f"ffn_{name}_exps.weight"] = np.stack(
                [read(f"{prefix}.mlp.experts.{e}.{name}_proj.weight") for e in range(m.n_routed_experts)])
    return tensors


def _write_keys(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    a, m, yarn = config.attention, config.moe, config.attention.yarn
    writer.add_block_count(config.n_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.inter_dim)
    writer.add_leading_dense_block_count(config.n_dense_layers)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(a.n_heads)
    writer.add_head_count_kv(1)  # attention runs on latents, shared by all heads
    writer.add_q_lora_rank(a.q_lora_rank)
    writer.add_kv_lora_rank(a.kv_lora_rank)
    writer.add_key_length(a.kv_lora_rank + a.qk_rope_head_dim)
    writer.add_value_length(a.kv_lora_rank)
    writer.add_key_length_mla(a.qk_head_dim)
    writer.add_value_length_mla(a.v_head_dim)
    writer.add_rope_dimension_count(a.qk_rope_head_dim)
    writer.add_rope_freq_base(a.rope_theta)
    if yarn is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_seq_len)
        writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)
    writer.add_expert_count(m.n_routed_experts)
    writer.add_expert_used_count(m.n_activated_experts)
    writer.add_expert_shared_count(m.n_shared_experts)
    writer.add_expert_feed_forward_length(m.moe_inter_dim)
    writer.add_expert_weights_scale(m.route_scale)
    writer.add_expert_weights_norm(m.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if m.n_expert_groups > 1:
        writer.add_expert_group_count(m.n_expert_groups)
        writer.add_expert_group_used_count(m.n_limited_groups)


def _write_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, size))])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2,
                            *[gguf.TokenType.NORMAL] * (size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
