"""Text in, text out: a prompt continued piece by piece."""

import dataclasses
from collections.abc import Iterator

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
    model = Transformer(dataclasses.replace(config, remat="none"), ops)
    generate = make_generator(model, tokenizer.vocab_size, cache_length)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    return tokenizer.decode_stream(generate(variables, ids, eos_id=tokenizer.eos_id, **sampling))
