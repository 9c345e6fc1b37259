"""Multi-token prediction: what each depth reads and predicts, and what it shares."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILY, distance, random_batch, random_variables, transformer

from dsv3.model.batch import Batch
from dsv3.model.mtp import mtp_inputs


def test_inputs_of_each_depth_by_hand():
    row = jnp.arange(10, 17)[None]  # t_1 .. t_7
    batch = Batch(row[:, :-1], row[:, 1:], jnp.ones((1, 6)), jnp.array([[1, 1, 1, 2, 2, 2]]))
    first, second = mtp_inputs(batch, 1), mtp_inputs(batch, 2)
    assert first.tokens_BT.tolist() == [[11, 12, 13, 14, 15, 16]]
    assert first.targets_BT.tolist() == [[12, 13, 14, 15, 16, 0]]
    assert first.weights_BT.tolist() == [[1, 1, 0, 1, 1, 0]]
    assert second.tokens_BT.tolist() == [[12, 13, 14, 15, 16, 0]]
    assert second.targets_BT.tolist() == [[13, 14, 15, 16, 0, 0]]
    assert second.weights_BT.tolist() == [[1, 0, 0, 1, 0, 0]]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_rows_shorter_than_a_depth_keep_their_length_and_weigh_nothing(length):
    row = jnp.arange(2 * length).reshape(2, length)
    inputs = mtp_inputs(Batch(row, row, jnp.ones((2, length)), jnp.ones((2, length), int)), 3)
    assert {array.shape for array in inputs} == {(2, length)}
    assert not np.any(inputs.weights_BT)


def test_depth_k_sees_k_tokens_ahead_and_no_further():
    config = FAMILY["mtp_depth_two"]
    model, variables, batch = transformer(config), random_variables(config), random_batch(config)
    forward = jax.jit(lambda b: model.apply(variables, b, method="forward")[1])
    before = forward(batch)
    changed = batch._replace(targets_BT=batch.targets_BT.at[:, 6].add(1), tokens_BT=batch.tokens_BT.at[:, 7].add(1))
    after = forward(changed)  # t_8 is another token now (positions count from 0: input 7, target of 6)
    for depth, (a, b) in enumerate(zip(before, after, strict=True), start=1):
        moved = np.abs(np.asarray(a - b)).max(axis=(0, 2)) > 0
        assert moved.tolist() == [position >= 7 - depth for position in range(12)]


def test_embedding_and_head_are_shared_and_collect_gradients_from_both():
    config = FAMILY["v3"]
    model, variables, batch = transformer(config), random_variables(config), random_batch(config)
    assert set(variables["params"]["mtp_0"]) == {"hnorm", "enorm", "eh_proj", "block", "norm"}

    def losses(params):
        out = model.apply({**variables, "params": params}, batch)
        return jnp.stack([out.main, out.mtp_D[0]])

    grads = jax.jit(jax.jacrev(losses))(variables["params"])
    for name in ("embed", "head"):
        assert np.all(np.abs(np.asarray(grads[name])).sum(axis=(1, 2)) > 0)


def test_eh_proj_orders_are_the_same_model_with_its_halves_swapped():
    config = FAMILY["v3"]
    swapped = dataclasses.replace(config, mtp=dataclasses.replace(config.mtp, eh_order="hidden_first"))
    variables, batch = random_variables(config), random_batch(config)
    other = jax.tree.map(lambda x: x, variables)
    other["params"]["mtp_0"]["eh_proj"] = jnp.roll(variables["params"]["mtp_0"]["eh_proj"], config.dim, axis=0)
    expected = transformer(config).apply(variables, batch, method="forward")[1][0]
    assert distance(transformer(swapped).apply(other, batch, method="forward")[1][0], expected) < 1e-6
    assert distance(transformer(swapped).apply(variables, batch, method="forward")[1][0], expected) > 1e-2


def test_agreement_counts_equal_argmaxes_for_the_same_token():
    config = FAMILY["mtp_depth_two"]
    model, variables, batch = transformer(config), random_variables(config), random_batch(config)
    losses = model.apply(variables, batch)
    main, deeper = model.apply(variables, batch, method="forward")
    for depth, logits in enumerate(deeper, start=1):
        ahead = np.asarray(main).argmax(-1)[:, depth:]
        guess = np.asarray(logits).argmax(-1)[:, :-depth]
        weights = np.asarray(mtp_inputs(batch, depth).weights_BT)[:, :-depth]
        assert float(losses.agree_D[depth - 1]) == ((ahead == guess) * weights).sum()
        assert float(losses.mtp_tokens_D[depth - 1]) == weights.sum()
