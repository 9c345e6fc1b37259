"""How much arithmetic a token costs: the count behind MFU (docs/architecture.md states the formula)."""

from dsv3.config import ModelConfig


def attention_matrices(config: ModelConfig) -> int:
    """Multiply-adds per token of one layer's MLA projections."""
    c, d = config.attention, config.dim
    q_out = c.n_heads * c.qk_head_dim
    query = d * q_out if c.q_lora_rank is None else (d + q_out) * c.q_lora_rank
    keys_values = d * (c.kv_lora_rank + c.qk_rope_head_dim)
    keys_values += c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return query + keys_values + c.n_heads * c.v_head_dim * d


def moe_matrices(config: ModelConfig) -> int:
    """Multiply-adds per token of one MoE layer: gate, chosen experts and shared experts."""
    c = config.moe
    return config.dim * (c.n_routed_experts + 3 * c.moe_inter_dim * (c.n_activated_experts + c.n_shared_experts))


def forward_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True, mtp: bool = True) -> float:
    """2 x activated matrix elements (head included, embedding not) + the attention core over `seq_len` tokens.

    Causal attention counts half of the square. An MTP module is one more MoE layer, its `eh_proj` and the head again.
    """
    c = config.attention
    core = 2 * seq_len * c.n_heads * (c.qk_head_dim + c.v_head_dim) * (0.5 if causal else 1)
    attention = 2 * attention_matrices(config) + core
    dense, moe = 2 * 3 * config.dim * config.inter_dim, 2 * moe_matrices(config)
    head = 2 * config.dim * config.vocab_size
    total = config.n_layers * attention + config.n_dense_layers * dense + config.n_moe_layers * moe + head
    if mtp:
        total += config.mtp.depth * (attention + moe + head + 2 * 2 * config.dim ** 2)
    return total


def train_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True, mtp: bool = True) -> float:
    """Forward and backward: three times the forward count; recomputation is not useful work and is not counted."""
    return 3 * forward_flops_per_token(config, seq_len, causal=causal, mtp=mtp)
