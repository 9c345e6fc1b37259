"""Text in, text out: a prompt continued piece by piece."""

import dataclasses
from collections.abc import Iterator, Sequence

import chex

from dsv3.config import ModelConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.inference.generate import make_generator
from dsv3.model.ops import Ops
from dsv3.model.transformer import Transformer


def continue_text(
    config: ModelConfig, ops: Ops, variables: chex.ArrayTree, tokenizer: Tokenizer, prompt: str, *,
    cache_length: int, **sampling,
) -> Iterator[str]:
    """Pieces of the text that follows `prompt` (bos is put before it), as they are generated.

    `sampling` goes to `generate`: max_new_tokens, temperature, top_p, seed. Raises `UserError` as it does.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    return continue_ids(config, ops, variables, tokenizer, ids, cache_length=cache_length, **sampling)


def continue_ids(
    config: ModelConfig, ops: Ops, variables: chex.ArrayTree, tokenizer: Tokenizer, ids: Sequence[int], *,
    cache_length: int, **sampling,
) -> Iterator[str]:
    """The same after token ids, which begin with bos or whatever else the model expects there."""
    model = Transformer(dataclasses.replace(config, remat="none"), ops)
    generate = make_generator(model, tokenizer.vocab_size, cache_length)
    return tokenizer.decode_stream(generate(variables, ids, eos_id=tokenizer.eos_id, **sampling))
