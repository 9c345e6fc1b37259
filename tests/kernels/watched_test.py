"""Statistics as gradients: through scans, recomputation, devices and custom gradients, each to its own layer."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import mesh_of

from dsv3.config import UserError
from dsv3.kernels.dot import dot
from dsv3.kernels.watched import put, take, watched
from dsv3.parallel.mesh import BATCH

LAYERS, WIDTH = 3, 8


def observe(x, w, d_y):
    """Sums that tell layers, operands and directions apart."""
    return {"x": jnp.sum(x), "w": jnp.sum(w), "d_y": jnp.stack([jnp.sum(d_y), jnp.sum(d_y ** 2)])}


LIKE = {"x": jnp.zeros(()), "w": jnp.zeros(()), "d_y": jnp.zeros(2)}


class Layer(nn.Module):
    """x + tanh(x w)."""

    watch: bool

    @nn.compact
    def __call__(self, x, _):
        w = self.param("w", nn.initializers.normal(0.5), (WIDTH, WIDTH))
        product = watched(dot, observe) if self.watch else dot
        return x + jnp.tanh(product(x, w)), None


def stack(watch, remat):
    layer = nn.remat(Layer, prevent_cse=False) if remat else Layer
    return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)(watch, name="layers")


def loop_statistics(w_LDD, x):
    """By hand, layer by layer in float64: what every layer's `observe` must have seen, for the loss sum(y^3)."""
    inputs = []
    for w in w_LDD:
        inputs.append(x)
        x = x + np.tanh(x @ w)
    d, found = 3 * x ** 2, [None] * LAYERS
    for layer in reversed(range(LAYERS)):
        x, w = inputs[layer], w_LDD[layer]
        d_y = d * (1 - np.tanh(x @ w) ** 2)
        found[layer] = [x.sum(), w.sum(), d_y.sum(), (d_y ** 2).sum()]
        d = d + d_y @ w.T
    return np.array(found)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("n_devices", [1, 4])
def test_every_layer_gets_its_own_statistics(remat, n_devices):
    """Under nn.scan, nn.remat and shard_map over four devices with two micro-batches each, against a loop in NumPy."""
    x = jax.random.normal(jax.random.key(0), (2, 8, WIDTH))
    params = stack(False, remat).init(jax.random.key(1), x[0], None)
    loss = lambda params, x: jnp.sum(stack(True, remat).apply(params, x, None)[0] ** 3)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(n_devices), in_specs=(P(), BATCH), out_specs=P(), check_vma=False)
    def mail(params, x_MBD):
        add = lambda sums, x: (jax.tree.map(jnp.add, sums, jax.grad(loss)(params, x)), None)
        sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), x_MBD)
        return jax.lax.psum(sums, "data")

    w_LDD = np.asarray(params["params"]["w"], np.float64)
    taken = take(mail(params, x)["params"]["w"], LIKE, stacked=1)
    found = np.concatenate([np.stack([taken["x"], taken["w"]], 1), taken["d_y"]], axis=1)
    expected = loop_statistics(w_LDD, np.asarray(x, np.float64).reshape(-1, WIDTH))
    expected[:, 1] *= 2 * n_devices  # a weight is seen once by every micro-batch of every device
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_value_and_gradient_of_the_input_are_those_of_the_product():
    x = jax.random.normal(jax.random.key(0), (5, WIDTH))
    params = stack(False, False).init(jax.random.key(1), x, None)
    run = lambda watch: jax.value_and_grad(
        lambda x: jnp.sum(stack(watch, False).apply(params, x, None)[0] ** 2))(x)
    chex.assert_trees_all_equal(run(True), run(False))


def test_the_input_may_be_a_tree_with_integers():
    """As of a grouped product: rows and their sizes."""
    product = lambda xs, w: dot(xs[0], w) * xs[1].astype(jnp.float32)
    run = watched(product, lambda xs, w, d_y: jnp.sum(xs[0] * xs[1]))
    x, sizes, w = jnp.ones((2, 4)), jnp.array([[3], [5]]), jnp.ones((4, 4))
    d_x, mail = jax.grad(lambda x, w: jnp.sum(run((x, sizes), w)), (0, 1))(x, w)
    np.testing.assert_array_equal(d_x, np.array([[12.0] * 4, [20.0] * 4]))
    assert take(mail, jnp.zeros(())) == 32 and (mail.ravel()[1:] == 0).all()


def test_mail_comes_back_and_must_fit():
    tree = {"a": jnp.arange(3.0), "b": (jnp.float32(7), jnp.ones((2, 2)))}
    letter = put(tree, jnp.ones((3, 4)))
    assert letter.shape == (3, 4)
    chex.assert_trees_all_equal(take(letter, tree), tree)
    chex.assert_trees_all_equal(take(jnp.stack([letter, 2 * letter]), tree, stacked=1)["a"],
                                jnp.stack([jnp.arange(3.0), 2 * jnp.arange(3.0)]))
    with pytest.raises(UserError, match=r"shape \(2, 3\) has no room for 8 statistics"):
        put(tree, jnp.ones((2, 3)))
    with pytest.raises(AssertionError, match="bfloat16"):
        put(tree, jnp.ones((3, 4), jnp.bfloat16))
