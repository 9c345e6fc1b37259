"""The published form of the family, read by `dsv3.interop`, computes what transformers computes from it.

`tests/goldens/make_hf_goldens.py` made the checkpoints and says what `expected.npz` holds.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from dsv3.inference.generate import make_generator
from dsv3.interop.load import load
from dsv3.model.batch import Batch
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer

CASES = sorted((Path(__file__).parents[1] / "goldens" / "hf").iterdir())
BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def opened(case):
    """The checkpoint and what is expected of it, everything float32."""
    config, variables = load(case)
    return dataclasses.replace(config, dtype="float32"), variables, np.load(case / "expected.npz")


def batch_of(tokens_T, segment_ids_T=None) -> Batch:
    """One row, all of it valid unless `segment_ids_T` says otherwise; targets are the next tokens."""
    tokens_BT = jnp.asarray(tokens_T)[None]
    segment_ids_BT = jnp.ones_like(tokens_BT) if segment_ids_T is None else segment_ids_T[None]
    targets_BT = jnp.pad(tokens_BT[:, 1:], [(0, 0), (0, 1)])
    return Batch(tokens_BT, targets_BT, jnp.ones(tokens_BT.shape, jnp.float32), segment_ids_BT)


def worst(actual_TV, expected_TV) -> float:
    """The largest |actual - expected| / |expected| of a position."""
    difference = np.linalg.norm(np.asarray(actual_TV, np.float64) - expected_TV, axis=-1)
    return float(np.max(difference / np.linalg.norm(expected_TV, axis=-1)))


def forward(config, variables, tokens_T):
    """Logits [T, V] of the main model and of every MTP depth."""
    model = Transformer(config, reference_ops(row_block=4))
    logits, ahead = jax.jit(lambda v, b: model.apply(v, b, method="forward"))(variables, batch_of(tokens_T))
    return logits[0], [deeper[0] for deeper in ahead]


def choices(config, variables, tokens_T):
    """Which experts every token visits, per stack of MoE layers: bool [T, L, E] (MTP: [T, E]).

    The load of a batch counts choices over its valid tokens. With a single valid token it shows what that one chose.
    """
    model = Transformer(config, reference_ops(row_block=4))

    @jax.jit
    def loads_of(variables, only_TT):
        return jax.lax.map(lambda valid_T: model.apply(variables, batch_of(tokens_T, valid_T)).load, only_TT)

    loads = loads_of(variables, jnp.eye(len(tokens_T), dtype=jnp.int32))
    return {name: np.asarray(load) > 0 for name, load in loads.items()}


def members(choices_TK, n_experts):
    """The same as bool [T, E]."""
    return np.any(choices_TK[..., None] == np.arange(n_experts), axis=1)


@BY_NAME
def test_logits_and_choices_are_those_of_transformers(case):
    """float32 on both sides: 2e-5 at every position, every token's experts in every MoE layer, MTP included."""
    config, variables, expected = opened(case)
    tokens_T, n_experts = expected["tokens"], config.moe.n_routed_experts
    logits_TV, ahead = forward(config, variables, tokens_T)
    assert worst(logits_TV, expected["logits"]) < 2e-5
    chosen = choices(config, variables, tokens_T)
    for layer, choices_TK in enumerate(expected["choices"]):
        np.testing.assert_array_equal(chosen["moe_layers"][:, layer], members(choices_TK, n_experts))
    assert len(ahead) == ("mtp_logits" in expected)
    for deeper_TV in ahead:  # the last position has no next token to embed
        assert worst(deeper_TV[:-1], expected["mtp_logits"]) < 2e-5
        np.testing.assert_array_equal(chosen["mtp_0"][:-1], members(expected["mtp_choices"][0], n_experts))


@BY_NAME
def test_greedy_continuations_are_those_of_transformers(case):
    """64 tokens over the absorbed latent cache."""
    config, variables, expected = opened(case)
    prompt, continuation = expected["tokens"][:expected["prompt_length"]].tolist(), expected["continuation"].tolist()
    model = Transformer(config, reference_ops(row_block=4))
    generate = make_generator(model, config.vocab_size, len(prompt) + len(continuation))
    assert list(generate(variables, prompt, max_new_tokens=len(continuation), eos_id=None)) == continuation


TRAPS = [
    ("v3", "moe.route_scale", 1.0), ("v3", "moe.n_limited_groups", 4), ("v3", "moe.norm_topk_prob", False),
    ("v3_yarn", "attention.yarn", None), ("v3_yarn", "attention.yarn.original_seq_len", 4096),
    ("unequal_mscale", "attention.yarn.mscale", 0.4), ("unequal_mscale", "attention.yarn.mscale_all_dim", 0.707),
    ("moonlight", "norm_eps", 1e-6), ("moonlight", "attention.norm_eps", 1e-5),
    ("moonlight", "attention.rope_theta", 10000.0), ("kimi_k2", "attention.yarn.beta_fast", 32.0),
    ("v2_greedy", "moe.norm_topk_prob", True), ("v2_groups", "moe.n_limited_groups", 4),
    ("mtp", "mtp.eh_order", "hidden_first"), ("mtp", "mtp.hidden", "pre_norm"),
]


def replaced(node, path, value):
    name, _, rest = path.partition(".")
    return dataclasses.replace(node, **{name: replaced(getattr(node, name), rest, value) if rest else value})


def by_oracle(config, variables, expected):
    """float64 logits [T, V] of the main model and of every MTP depth."""
    tokens_BT = expected["tokens"][None]
    ones_BT, targets_BT = np.ones(tokens_BT.shape, int), np.pad(tokens_BT[:, 1:], [(0, 0), (0, 1)])
    found = oracle.forward(
        variables["params"], variables["routing"], config, tokens_BT, targets_BT, ones_BT, ones_BT, False)
    return found.logits_BTV[0], [logits_BTV[0] for logits_BTV in found.mtp_logits]


@BY_NAME
def test_the_oracle_agrees_with_transformers(case):
    """float64 NumPy, written from the report, against float32 torch."""
    config, variables, expected = opened(case)
    logits_TV, ahead = by_oracle(config, variables, expected)
    assert worst(expected["logits"], logits_TV) < 1e-5
    for deeper_TV in ahead:
        assert worst(expected["mtp_logits"], deeper_TV[:-1]) < 1e-5


@pytest.mark.parametrize("name, path, value", TRAPS, ids=lambda value: str(value))
def test_a_mistaken_field_shows(name, path, value):
    """The goldens can tell: with any of these fields set otherwise, some logits are a tenth of their length away."""
    config, variables, expected = opened(next(case for case in CASES if case.name == name))
    logits_TV, ahead = by_oracle(replaced(config, path, value), variables, expected)
    actual, wanted = (ahead[0][:-1], "mtp_logits") if path.startswith("mtp.") else (logits_TV, "logits")
    assert worst(actual, expected[wanted]) > 0.1
