"""Recipes that differ from layer to layer: each layer computes by its own, on the same parameters."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILY, distance, model_config, random_batch, random_variables

from dsv3.config import Layers, Site, resolve
from dsv3.inference.cache import empty_caches
from dsv3.model.fp8_ops import fp8_ops
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer

FP8 = resolve("fp8")
CONFIG = FAMILY["v3"]
N_LAYERS = CONFIG.n_layers
PLAIN = Site(pattern="*", rule=None)


def layered(*ranges, sites=(PLAIN,)):
    return replace(FP8, layers=tuple(Layers(first=first, last=last, sites=sites) for first, last in ranges))


@cache
def losses(recipe):
    """Of the miniature by a recipe; None: without one."""
    ops = reference_ops() if recipe is None else fp8_ops(recipe)
    return jax.jit(Transformer(CONFIG, ops).apply)(random_variables(CONFIG), random_batch(CONFIG))


def apart(one, other):
    """The largest norm-wise distance between two trees' arrays."""
    return max(distance(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
               if np.linalg.norm(b) > 0)


def test_of_layer_puts_a_layers_own_sites_first():
    own = Site(pattern="attn.o", rule=FP8.default)
    recipe = replace(FP8, layers=(Layers(first=1, last=2, sites=(own,)), Layers(first=2, last=2, sites=(PLAIN,))))
    assert recipe.of_layer(0) == FP8 == recipe.of_layer(3)
    assert recipe.of_layer(1).rule_of("attn.o") == FP8.default != FP8.rule_of("attn.o")
    assert recipe.of_layer(2).rule_of("attn.o") == FP8.default and recipe.of_layer(2).rule_of("attn.q_a") is None
    bundle = fp8_ops(recipe)
    assert len(bundle.layers) == 3 and bundle.of_layer(3) is bundle.of_layer(9) is bundle
    alike = fp8_ops(layered((0, 0), (2, 2)))
    assert alike.of_layer(0) is alike.of_layer(2) != alike.of_layer(1)


@pytest.mark.slow
def test_every_layer_without_a_rule_is_the_model_in_its_own_dtype():
    """The MTP module is the layer after the last."""
    assert CONFIG.mtp.depth == 1
    assert apart(losses(layered((0, N_LAYERS))), losses(None)) < 1e-6
    without_mtp = losses(layered((0, N_LAYERS - 1)))
    np.testing.assert_allclose(without_mtp.main, losses(None).main, rtol=1e-6)
    assert np.all(np.abs(without_mtp.mtp_D - losses(None).mtp_D) > 1e-5 * losses(None).mtp_D)


@pytest.mark.slow
def test_layers_with_the_rules_they_had_change_nothing():
    """The run of layers is cut in two, and its parts are the whole; two dense layers, so that it compiles soon."""
    config = model_config(n_layers=2, n_dense_layers=2, mtp=dict(depth=0))
    same = replace(FP8, layers=(Layers(first=1, last=1, sites=(Site(pattern="attn.q_a", rule=FP8.default),)),))
    assert fp8_ops(same).of_layer(0) != fp8_ops(same).of_layer(1)
    variables, batch = random_variables(config), random_batch(config)

    def gradients(recipe):
        loss = lambda params: Transformer(config, fp8_ops(recipe)).apply({"params": params}, batch).main
        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    assert apart(gradients(same), gradients(FP8)) < 1e-5


@pytest.mark.slow
def test_one_layer_in_the_models_dtype_lies_between():
    """Its own products are exact, those of the others are not: neither model's loss, and nearer to no recipe."""
    positions, batch = jnp.broadcast_to(jnp.arange(12), (2, 12)), random_batch(CONFIG)

    def logits(recipe, method, *arguments):
        ops = reference_ops() if recipe is None else fp8_ops(recipe)
        return jax.jit(lambda: Transformer(CONFIG, ops).apply(random_variables(CONFIG), *arguments, method=method))()[0]

    exact = logits(None, "forward", batch)
    assert distance(logits(layered((0, 1)), "forward", batch), exact) < distance(logits(FP8, "forward", batch), exact)
    caches = empty_caches(CONFIG, 2, 16)
    absorbed = layered((0, 1), sites=(PLAIN,))
    text = logits(absorbed, "decode", batch.tokens_BT, positions, caches)
    assert distance(text, logits(absorbed, "forward", batch)) < 0.03
