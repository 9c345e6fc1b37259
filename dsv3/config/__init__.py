"""Rank 0: every hyper-parameter, complete and validated, with DeepSeek's names."""

from dataclasses import dataclass
from typing import Literal

from dsv3.config.data import DEEPSEEK_V3_TOKENS, DataConfig, SourceConfig
from dsv3.config.errors import UserError, require
from dsv3.config.mesh import MeshConfig
from dsv3.config.model import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, YarnConfig
from dsv3.config.quant import Layers, Operand, QuantConfig, Rule, Site, resolve
from dsv3.config.schema import Node, differences, from_dict, override, to_dict
from dsv3.config.train import EMAConfig, GuardConfig, OptimizerConfig, Phase, TrainConfig, constant

__all__ = [
    "AttentionConfig", "Config", "DataConfig", "EMAConfig", "GuardConfig", "Layers", "MTPConfig", "MeshConfig",
    "MoEConfig", "ModelConfig", "Operand", "OptimizerConfig", "Phase", "QuantConfig", "Rule", "Site", "SourceConfig",
    "TrainConfig", "UserError", "YarnConfig", "constant", "differences", "from_dict", "override", "require", "resolve",
    "to_dict",
]


@dataclass(frozen=True, kw_only=True)
class Config(Node):
    """One experiment: a model, the text it reads, how it is trained, and on what.

    `kernels`: `auto` takes the fastest form of every operation that the device has and warns where it must fall back to
    the reference, `require` raises there instead, `reference` takes plain jnp everywhere.

    `quant`: the name of a recipe (`bf16`, `fp8` and others, `dsv3/config/quant.py`), or a recipe.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig
    kernels: Literal["auto", "reference", "require"]
    quant: str | QuantConfig

    @property
    def recipe(self) -> QuantConfig | None:
        """What `quant` names; None for bf16."""
        return resolve(self.quant)

    def validate(self) -> None:
        recipe, n_layers = resolve(self.quant), self.model.n_layers + self.model.mtp.depth
        for layers in recipe.layers if recipe else ():
            require(layers.last < n_layers, f"quant.layers reaches layer {layers.last}; the model and its MTP modules "
                    f"have {n_layers}")
        require(self.model.mtp.depth < self.train.seq_len,
                f"model.mtp.depth {self.model.mtp.depth} leaves no position of train.seq_len {self.train.seq_len}")
        require(self.data.tokenizer != "bpe" or self.data.bpe_vocab_size <= self.model.vocab_size,
                f"data.bpe_vocab_size {self.data.bpe_vocab_size} exceeds model.vocab_size {self.model.vocab_size}: "
                "every token needs an embedding")
        require(self.data.tokenizer != "deepseek_v3" or DEEPSEEK_V3_TOKENS <= self.model.vocab_size,
                f"data.tokenizer deepseek_v3 has {DEEPSEEK_V3_TOKENS} tokens, more than model.vocab_size "
                f"{self.model.vocab_size}: every token needs an embedding")
        rows = self.train.micro_batch_size * self.mesh.data
        require(self.train.batch_increment % rows == 0,
                f"train.batch_increment {self.train.batch_increment} is not divisible by train.micro_batch_size "
                f"{self.train.micro_batch_size} times mesh.data {self.mesh.data}")
        require(self.data.eval_stride <= self.train.seq_len,
                f"data.eval_stride {self.data.eval_stride} exceeds train.seq_len {self.train.seq_len}: "
                "tokens between windows would not be scored")
