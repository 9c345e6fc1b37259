"""Autoregressive generation over the latent cache, one token at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import require
from dsv3.inference.cache import empty_caches
from dsv3.inference.sampling import check_sampling, sample
from dsv3.model.transformer import Transformer

PROMPT_BUCKET = 32
"""Prompts are padded to a multiple of this many tokens, so that prefill compiles once per bucket."""


def check_prompt(prompt: Sequence[int], vocab_size: int, cache_length: int) -> None:
    """Raise `UserError` for an empty prompt, ids outside the vocabulary, or more tokens than the cache has slots."""
    require(len(prompt) > 0, "the prompt has no token; begin it with the tokenizer's bos")
    outside = [token for token in prompt if not 0 <= token < vocab_size]
    require(not outside, f"token id {outside[:1]} is outside the vocabulary of {vocab_size}")
    require(len(prompt) < cache_length,
            f"the prompt has {len(prompt)} tokens and leaves no room in a cache of {cache_length}; "
            "shorten it or raise the cache length")


def make_generator(
    model: Transformer, vocab_size: int, cache_length: int,
) -> Callable[..., Iterator[int]]:
    """A function `generate(variables, prompt, ...)` that yields token ids; compiled pieces are kept between calls.

    Tokens from `vocab_size` up (rows of the embedding that no tokenizer entry uses) are never sampled.
    """

    @partial(jax.jit, donate_argnames="caches")
    def advance(variables, tokens_BT, start, last, caches, key, temperature, top_p):
        """Feed tokens from position `start` on, and sample after the one at index `last`."""
        positions_BT = start + jnp.arange(tokens_BT.shape[1])[None]
        logits_BTV, caches = model.apply(variables, tokens_BT, positions_BT, caches, method="decode")
        logits_BV = jnp.where(jnp.arange(logits_BTV.shape[-1])[None] < vocab_size, logits_BTV[:, last], -jnp.inf)
        return sample(logits_BV, key, temperature, top_p), caches

    def generate(
        variables: chex.ArrayTree, prompt: Sequence[int], *, max_new_tokens: int, eos_id: int | None,
        temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
    ) -> Iterator[int]:
        """Yield up to `max_new_tokens` ids after `prompt`; ends early at `eos_id` or when the cache is full.

        Raises `UserError` (at once, not at the first token) for a prompt or sampling setting that cannot work.
        """
        check_prompt(prompt, vocab_size, cache_length)
        check_sampling(temperature, top_p)
        require(max_new_tokens > 0, f"max_new_tokens is {max_new_tokens}; expected a positive number")
        return stream(variables, prompt, min(max_new_tokens, cache_length - len(prompt)), eos_id,
                      jax.random.key(seed), jnp.float32(temperature), jnp.float32(top_p))

    def stream(variables, prompt, n_tokens, eos_id, key, temperature, top_p):
        # Slots behind the prompt get latents of padding; each is overwritten before any query may see it.
        padded = min(-(-len(prompt) // PROMPT_BUCKET) * PROMPT_BUCKET, cache_length)
        tokens_BT = np.zeros((1, padded), np.int32)
        tokens_BT[0, :len(prompt)] = prompt
        caches = empty_caches(model.config, 1, cache_length)
        start, last = 0, len(prompt) - 1
        for index in range(n_tokens):
            token_B, caches = advance(
                variables, tokens_BT, start, last, caches, jax.random.fold_in(key, index), temperature, top_p)
            token = int(token_B[0])
            if token == eos_id:
                return
            yield token
            tokens_BT, start, last = np.array([[token]], np.int32), len(prompt) + index, 0

    return generate
