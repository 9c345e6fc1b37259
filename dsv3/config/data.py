"""Where text comes from, how it becomes tokens, and how validation is measured."""

import math
from dataclasses import dataclass
from typing import Literal

from dsv3.config.errors import require
from dsv3.config.schema import Node

DEEPSEEK_V3_TOKENS = 128_815
"""Entries of the released tokenizer; the released embedding has 129,280 rows."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Node):
    """Documents that are mixed as one: `weight` over the sum of all weights is their share of the training rows.

    Each of `files` is a file, a directory (everything below it with a known suffix) or a glob in which `**` matches
    directories at any depth (docs/data.md). `None` is the source of the running Python's standard library.
    `text_field` is the field of a JSON record, or the column of a Parquet table, that holds a document's text.
    """

    files: tuple[str, ...] | None
    text_field: str
    weight: float

    def validate(self) -> None:
        require(self.files is None or (len(self.files) > 0 and "" not in self.files),
                f"source.files is {self.files!r}; expected files, directories or globs, or None for the standard "
                "library")
        require(self.text_field != "", "source.text_field is empty; name the field that holds the text, as in 'text'")
        require(0 < self.weight < math.inf, f"source.weight is {self.weight}; expected a positive number")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Node):
    """The text of all `sources`, as tokens.

    `bpe_vocab_size` is read by the tokenizer `bpe` alone. `split_rate` is the share of tokens joining punctuation and
    a line break that are split in training (report section 4.1, which does not state the share).
    Validation scores `eval_bytes` of held-out documents in windows of `train.seq_len` tokens that advance by
    `eval_stride` (docs/data.md).
    """

    sources: tuple[SourceConfig, ...]
    validation_fraction: float
    tokenizer: Literal["bpe", "bytes", "deepseek_v3"]
    bpe_vocab_size: int
    split_rate: float
    fim_rate: float
    segment_ids: bool
    eval_bytes: int
    eval_stride: int
    seed: int

    def validate(self) -> None:
        require(len(self.sources) > 0, "data.sources is empty; give at least one source of text")
        require(0 < self.validation_fraction < 1,
                f"data.validation_fraction is {self.validation_fraction}; expected between 0 and 1")
        require(0 <= self.seed < 2**32, f"data.seed is {self.seed}; expected 0 to 2**32 - 1")
        for name in ("split_rate", "fim_rate"):
            require(0 <= getattr(self, name) <= 1, f"data.{name} is {getattr(self, name)}; expected between 0 and 1")
        for name in ("bpe_vocab_size", "eval_bytes", "eval_stride"):
            require(getattr(self, name) > 0, f"data.{name} is {getattr(self, name)}; expected a positive number")
