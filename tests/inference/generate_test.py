"""Generation over the cache against the full forward, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILY, random_variables, transformer

from dsv3.config import UserError
from dsv3.inference.cache import empty_caches
from dsv3.inference.generate import make_generator
from dsv3.model.batch import Batch

CONFIG = FAMILY["v3"]


@pytest.fixture(scope="module")
def generator():
    return make_generator(transformer(CONFIG), CONFIG.vocab_size, 24), random_variables(CONFIG)


def test_greedy_tokens_are_the_argmax_of_the_full_forward(generator):
    """Each new token from scratch, without any cache, at one padded length (what follows is causal anyway)."""
    generate, variables = generator
    prompt = [5, 17, 3, 40]
    tokens = list(generate(variables, prompt, max_new_tokens=8, eos_id=None))
    model = transformer(CONFIG)
    forward = jax.jit(lambda batch: model.apply(variables, batch, method="forward")[0])
    row = prompt.copy()
    for token in tokens:
        padded = jnp.zeros((1, 16), jnp.int32).at[0, :len(row)].set(jnp.array(row))
        logits = forward(Batch(padded, padded, jnp.ones((1, 16)), jnp.ones((1, 16), jnp.int32)))
        assert token == int(jnp.argmax(logits[0, len(row) - 1]))
        row.append(token)
    assert len(tokens) == 8


def test_a_seed_fixes_the_text_and_another_changes_it(generator):
    generate, variables = generator
    texts = [list(generate(variables, [1, 2], max_new_tokens=12, eos_id=None, temperature=1.0, seed=s))
             for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_generation_ends_at_eos_and_at_the_end_of_the_cache(generator):
    generate, variables = generator
    free = list(generate(variables, [5, 17, 3], max_new_tokens=100, eos_id=None))
    assert len(free) == 24 - 3
    assert list(generate(variables, [5, 17, 3], max_new_tokens=100, eos_id=free[4])) == free[:free.index(free[4])]


def test_unused_rows_of_the_embedding_are_never_sampled():
    generate = make_generator(transformer(CONFIG), 7, 24)
    tokens = list(generate(random_variables(CONFIG), [1], max_new_tokens=20, eos_id=None, temperature=5.0))
    assert len(tokens) == 20 and max(tokens) < 7


@pytest.mark.parametrize("prompt, message", [
    (list(range(24)), "leaves no room"), ([], "no token"), ([3, 61], "outside the vocabulary"),
    ([-1], "outside the vocabulary")])
def test_bad_prompts_are_refused_before_anything_is_computed(generator, prompt, message):
    generate, variables = generator
    with pytest.raises(UserError, match=message):
        generate(variables, prompt, max_new_tokens=1, eos_id=None)


def test_logits_do_not_depend_on_what_the_cache_held(generator):
    """Poisoned slots: whatever was there before is overwritten before it is seen."""
    model, variables = transformer(CONFIG), generator[1]
    decode = jax.jit(lambda t, p, c: model.apply(variables, t, p, c, method="decode")[0])
    tokens, positions = jnp.array([[4, 9, 2]]), jnp.arange(3)[None]
    clean = empty_caches(CONFIG, 1, 8)
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, 1e4), clean)
    np.testing.assert_array_equal(decode(tokens, positions, clean), decode(tokens, positions, poisoned))
