"""Where text comes from, how it becomes tokens, and how validation is measured."""

from dataclasses import dataclass
from typing import Literal

from dsv3.config.errors import require
from dsv3.config.schema import Node


@dataclass(frozen=True, kw_only=True)
class DataConfig(Node):
    """A corpus of text files. `path=None` reads the source of the running Python's standard library.

    Validation scores `eval_bytes` of held-out documents in windows of `train.seq_len` tokens that advance by
    `eval_stride` (docs/data.md).
    """

    path: str | None
    pattern: str
    validation_fraction: float
    tokenizer: Literal["bpe", "bytes"]
    bpe_vocab_size: int
    fim_rate: float
    segment_ids: bool
    eval_bytes: int
    eval_stride: int
    seed: int

    def validate(self) -> None:
        require(0 < self.validation_fraction < 1,
                f"data.validation_fraction is {self.validation_fraction}; expected between 0 and 1")
        require(self.path != "", "data.path is empty; give a file or a directory, or None for the standard library")
        require(0 <= self.seed < 2**32, f"data.seed is {self.seed}; expected 0 to 2**32 - 1")
        require(0 <= self.fim_rate <= 1, f"data.fim_rate is {self.fim_rate}; expected between 0 and 1")
        for name in ("bpe_vocab_size", "eval_bytes", "eval_stride"):
            require(getattr(self, name) > 0, f"data.{name} is {getattr(self, name)}; expected a positive number")
