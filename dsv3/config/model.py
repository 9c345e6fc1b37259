"""Hyper-parameters of the architecture, under DeepSeek's own names (report sections 2 and 4.2)."""

from dataclasses import dataclass
from typing import Literal

from dsv3.config.errors import require
from dsv3.config.schema import Node


@dataclass(frozen=True, kw_only=True)
class YarnConfig(Node):
    """YaRN context extension (report section 4.3): rotations slower than `beta_slow` are stretched by `factor`."""

    factor: float
    original_seq_len: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    def validate(self) -> None:
        require(self.factor >= 1, f"yarn.factor is {self.factor}; expected at least 1")
        require(self.original_seq_len > 0,
                f"yarn.original_seq_len is {self.original_seq_len}; expected a positive length")
        require(self.beta_fast >= self.beta_slow > 0,
                f"yarn.beta_fast {self.beta_fast} must be at least beta_slow {self.beta_slow}, both positive")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Node):
    """Multi-head latent attention. `q_lora_rank=None` projects queries directly (V2-Lite, Moonlight).

    `norm_eps` belongs to the norms of the two latents. Released code leaves it at 1e-6 whatever `rms_norm_eps` is,
    which counts where the two differ (Moonlight: 1e-5); every other norm of the model takes `model.norm_eps`.
    """

    n_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float
    yarn: YarnConfig | None
    norm_eps: float

    def validate(self) -> None:
        for name in ("n_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                     "rope_theta", "norm_eps"):
            require(getattr(self, name) > 0, f"attention.{name} is {getattr(self, name)}; expected a positive value")
        require(self.q_lora_rank is None or self.q_lora_rank > 0,
                f"attention.q_lora_rank is {self.q_lora_rank}; use None for no query compression")
        require(self.qk_rope_head_dim % 2 == 0,
                f"attention.qk_rope_head_dim is {self.qk_rope_head_dim}; RoPE rotates pairs, so it must be even")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Node):
    """DeepSeekMoE. `selection_bias`: V3's balancing without an auxiliary loss. Without it (V2), groups score by max."""

    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    n_expert_groups: int
    n_limited_groups: int
    moe_inter_dim: int
    score_func: Literal["sigmoid", "softmax"]
    selection_bias: bool
    norm_topk_prob: bool
    route_scale: float

    def validate(self) -> None:
        for name in ("n_routed_experts", "n_activated_experts", "n_expert_groups", "n_limited_groups",
                     "moe_inter_dim", "route_scale"):
            require(getattr(self, name) > 0, f"moe.{name} is {getattr(self, name)}; expected a positive value")
        require(self.n_shared_experts >= 0, f"moe.n_shared_experts is {self.n_shared_experts}; expected 0 or more")
        require(self.n_routed_experts % self.n_expert_groups == 0,
                f"moe.n_routed_experts {self.n_routed_experts} is not divisible by "
                f"moe.n_expert_groups {self.n_expert_groups}")
        require(self.n_limited_groups <= self.n_expert_groups,
                f"moe.n_limited_groups {self.n_limited_groups} exceeds moe.n_expert_groups {self.n_expert_groups}")
        allowed = self.n_limited_groups * self.experts_per_group
        require(self.n_activated_experts <= allowed,
                f"moe.n_activated_experts {self.n_activated_experts} exceeds the {allowed} experts that "
                f"{self.n_limited_groups} allowed groups of {self.experts_per_group} hold")
        require(self.n_expert_groups == 1 or not self.selection_bias or self.experts_per_group >= 2,
                f"moe.n_expert_groups {self.n_expert_groups} leaves {self.experts_per_group} expert a group; "
                "a group is scored by its two best, so it needs at least 2")

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_expert_groups


@dataclass(frozen=True, kw_only=True)
class MTPConfig(Node):
    """Multi-token prediction (report section 2.2), `depth` modules in sequence.

    The report concatenates the hidden state first; the released weights want the embedding first (`eh_order`).
    Whether the hidden state is taken before or after the final norm is not stated (`hidden`).
    """

    depth: int
    eh_order: Literal["embedding_first", "hidden_first"]
    hidden: Literal["post_norm", "pre_norm"]

    def validate(self) -> None:
        require(self.depth >= 0, f"mtp.depth is {self.depth}; expected 0 (off) or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Node):
    """The whole architecture. `dtype` is that of activations and matrix products; parameters are float32 masters."""

    vocab_size: int
    dim: int
    inter_dim: int
    n_layers: int
    n_dense_layers: int
    norm_eps: float
    init_std: float
    dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "report", "full"]
    scan_unroll: int
    attention: AttentionConfig
    moe: MoEConfig
    mtp: MTPConfig

    def validate(self) -> None:
        for name in ("vocab_size", "dim", "inter_dim", "n_layers", "norm_eps", "init_std", "scan_unroll"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; expected a positive value")
        require(0 <= self.n_dense_layers <= self.n_layers,
                f"model.n_dense_layers {self.n_dense_layers} is not between 0 and model.n_layers {self.n_layers}")

    @property
    def n_moe_layers(self) -> int:
        return self.n_layers - self.n_dense_layers
