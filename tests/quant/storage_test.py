"""The table of bytes against real arrays: a training state, its gradients, and quantised arrays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_models import model_config, random_batch, recipe_of, train_config, transformer

from dsv3.quant.formats import FORMATS
from dsv3.quant.storage import element_bytes, parameter_bytes, storage_table
from dsv3.quant.tiles import ALONG_COLUMNS, ALONG_ROWS, BLOCK, TENSOR, quantize
from dsv3.train.step import Knobs, abstract_state, make_gradients


def nbytes(*trees):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))


@pytest.mark.parametrize("moments, total", [("bfloat16", 12), ("float32", 16)])
def test_a_parameter_costs_what_the_state_and_its_gradient_have(moments, total):
    train = train_config(optimizer=dict(moment_dtype=moments))
    config = model_config()
    recipe = recipe_of(transformer(config), train)
    state = abstract_state(recipe)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    batches = jax.tree.map(lambda a: a[None], random_batch(config))
    gradient, _ = jax.eval_shape(make_gradients(recipe), state.params, state.routing, batches,
                                 Knobs(*[jnp.float32(0)] * 4))
    expected = parameter_bytes(train.optimizer)
    found = {"master": state.params, "gradient": gradient, "first moment": adam.mu, "second moment": adam.nu}
    assert {name: nbytes(tree) / count for name, tree in found.items()} == expected
    assert sum(expected.values()) == total
    others = nbytes(state) - nbytes(state.params, adam.mu, adam.nu)
    assert others < 0.01 * nbytes(state)  # routing biases and counters


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tile", [ALONG_ROWS, ALONG_COLUMNS, BLOCK], ids=str)
def test_an_element_costs_what_quantised_arrays_have(fmt, tile):
    stored = jax.eval_shape(lambda x: quantize(x, FORMATS[fmt], tile, power_of_two=False), jnp.zeros((384, 256)))
    assert nbytes(stored) / (384 * 256) == element_bytes(fmt, tile)
    whole = jax.eval_shape(lambda x: quantize(x, FORMATS[fmt], TENSOR, power_of_two=False), jnp.zeros((384, 256)))
    assert nbytes(whole) - 4 == 384 * 256 * element_bytes(fmt)


def test_figures_of_the_report():
    """FP8 with tiles 1 x 128 needs 52% of bfloat16, E5M6 77%; weights in blocks pay nothing for their scales."""
    assert element_bytes("e4m3", ALONG_ROWS) == 1 + 4 / 128 and element_bytes("e5m6", ALONG_ROWS) == 1.5 + 4 / 128
    assert element_bytes("e4m3", BLOCK) - 1 < 3e-4
    share = lambda name: element_bytes(name, ALONG_ROWS) / element_bytes("bfloat16")
    assert (round(share("e4m3"), 2), round(share("e5m6"), 2)) == (0.52, 0.77)


def test_the_document_shows_the_table():
    table = storage_table(train_config(optimizer=dict(moment_dtype="bfloat16")).optimizer)
    assert table in (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
