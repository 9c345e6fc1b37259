"""Rank 0: every hyper-parameter, complete and validated, with DeepSeek's names."""

from dataclasses import dataclass

from dsv3.config.data import DEEPSEEK_V3_TOKENS, DataConfig, SourceConfig
from dsv3.config.errors import UserError, require
from dsv3.config.model import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, YarnConfig
from dsv3.config.schema import Node, differences, from_dict, override, to_dict
from dsv3.config.train import OptimizerConfig, Phase, TrainConfig, constant

__all__ = [
    "AttentionConfig", "Config", "DataConfig", "ModelConfig", "MoEConfig", "MTPConfig", "OptimizerConfig", "Phase",
    "SourceConfig", "TrainConfig", "UserError", "YarnConfig", "constant", "differences", "from_dict", "override",
    "require", "to_dict",
]


@dataclass(frozen=True, kw_only=True)
class Config(Node):
    """One experiment: a model, the text it reads, and how it is trained."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    def validate(self) -> None:
        require(self.model.mtp.depth < self.train.seq_len,
                f"model.mtp.depth {self.model.mtp.depth} leaves no position of train.seq_len {self.train.seq_len}")
        require(self.data.tokenizer != "bpe" or self.data.bpe_vocab_size <= self.model.vocab_size,
                f"data.bpe_vocab_size {self.data.bpe_vocab_size} exceeds model.vocab_size {self.model.vocab_size}: "
                "every token needs an embedding")
        require(self.data.tokenizer != "deepseek_v3" or DEEPSEEK_V3_TOKENS <= self.model.vocab_size,
                f"data.tokenizer deepseek_v3 has {DEEPSEEK_V3_TOKENS} tokens, more than model.vocab_size "
                f"{self.model.vocab_size}: every token needs an embedding")
        require(self.data.eval_stride <= self.train.seq_len,
                f"data.eval_stride {self.data.eval_stride} exceeds train.seq_len {self.train.seq_len}: "
                "tokens between windows would not be scored")
