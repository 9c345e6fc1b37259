"""Non-finite losses and gradients: they change nothing, are counted, stop the run, and their origin is named."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import ONE_LAYER, read_lines, small_config, write_corpus
from tiny_models import model_config, random_batch, random_variables, recipe_of, train_config, train_state, transformer

from dsv3.config import UserError
from dsv3.model.ops import Ops, reference_ops
from dsv3.model.transformer import Transformer
from dsv3.train import diagnosis
from dsv3.train.diagnosis import first_nonfinite
from dsv3.train.loop import train
from dsv3.train.step import Knobs, make_train_step

CONFIG = model_config(n_layers=3, n_dense_layers=1)
SMALLEST = model_config(n_layers=1, n_dense_layers=0, mtp=dict(depth=0))
TRAIN = train_config()
KNOBS = Knobs(*map(np.float32, (1e-2, 0.01, 0.3, 1e-2)))


@jax.custom_vjp
def bad_gradient(x):
    """The identity, whose gradient is infinite."""
    return x


bad_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.full_like(g, jnp.inf),))


def broken_ops(site: str, *, backward: bool) -> Ops:
    """Reference operations, one of which gives a NaN (or an infinite gradient) at `site`."""
    ops = reference_ops(row_block=4, loss_chunk=8)
    spoil = bad_gradient if backward else lambda y: y.at[(0,) * y.ndim].set(jnp.nan)

    def at(name, function):
        return lambda *args, **kwargs: spoil(function(*args, **kwargs)) if name(args) == site else function(
            *args, **kwargs)

    named, experts = lambda args: args[0], lambda args: "experts"
    return dataclasses.replace(ops, linear=at(named, ops.linear), moe=at(experts, ops.moe),
                               attention_linear=at(named, ops.attention_linear))


@pytest.mark.parametrize("backward", [False, True], ids=["loss", "gradient"])
def test_a_bad_step_changes_nothing_but_its_count(backward):
    """Also when the loss is finite and only the gradient is not; and the next good step is as if it had not been."""
    batches = jax.tree.map(lambda a: a[None], random_batch(SMALLEST))
    fresh = lambda: train_state(random_variables(SMALLEST), TRAIN)
    bad = make_train_step(recipe_of(Transformer(SMALLEST, broken_ops("attn.o", backward=backward)), TRAIN))
    good = make_train_step(recipe_of(transformer(SMALLEST), TRAIN))
    state, metrics = bad(fresh(), batches, KNOBS)
    assert np.isfinite(metrics.loss) == backward and not np.isfinite(metrics.gradient_norm)
    for before, after in zip(fresh()[1:4], state[1:4], strict=True):
        chex.assert_trees_all_equal(after, before)
    assert int(state.step) == 1 and [int(n) for n in state.bad_steps] == [1, 1]
    state, _ = bad(state, batches, KNOBS)
    assert [int(n) for n in state.bad_steps] == [2, 2]
    state, metrics = good(state, batches, KNOBS)
    assert [int(n) for n in state.bad_steps] == [0, 2] and np.isfinite(metrics.loss)
    expected, _ = good(fresh(), batches, KNOBS)
    for after, wanted in zip(state[1:4], expected[1:4], strict=True):
        chex.assert_trees_all_equal(after, wanted)


@pytest.mark.parametrize("site, backward, place", [
    ("attn.o", False, "the output of dense_layers[0].attn"),
    ("experts", False, "the output of moe_layers[0].moe"),
    ("mtp.eh_proj", False, "the output of mtp_0"),
    ("attn.o", True, "the gradient of mtp_0.block/attn"),
    ("experts", True, "the gradient of mtp_0.block/moe"),
])
def test_the_first_bad_module_is_named(site, backward, place):
    variables = random_variables(CONFIG)
    model = Transformer(CONFIG, broken_ops(site, backward=backward))
    found = first_nonfinite(model, variables["params"], variables["routing"], random_batch(CONFIG), False)
    assert found.startswith(place), found


def test_a_bad_layer_of_a_stack_and_a_bad_parameter_are_named_and_a_good_model_is_not():
    variables = random_variables(CONFIG)
    model, batch = transformer(CONFIG), random_batch(CONFIG)
    assert first_nonfinite(model, variables["params"], variables["routing"], batch, False) is None
    router = variables["params"]["moe_layers"]["moe"]["gate"]
    variables["params"]["moe_layers"]["moe"]["gate"] = router.at[1, 0, 0].set(jnp.inf)
    found = first_nonfinite(model, variables["params"], variables["routing"], batch, False)
    assert found == "the values of params/moe_layers/moe/gate"
    gain = variables["params"]["moe_layers"]["attn"]["norm"]
    variables["params"]["moe_layers"]["moe"]["gate"] = router
    variables["params"]["moe_layers"]["attn"]["norm"] = gain.at[1].set(3e38)  # finite, but its product is not
    found = first_nonfinite(model, variables["params"], variables["routing"], batch, False)
    assert found == "the output of moe_layers[1].attn"


def test_every_layer_and_part_is_told_apart():
    """A NaN that a parameter brings into one part of one layer: that part is the first, whatever comes after it."""
    config = model_config(n_layers=5, n_dense_layers=2)
    variables, batch, model = random_variables(config), random_batch(config), transformer(config)
    expected = [f"{run}[{layer}].{part}" for run, parts, depth in (
        ("dense_layers", ("attn", "mlp"), 2), ("moe_layers", ("attn", "moe"), 3)) for layer in range(depth)
        for part in parts]
    names = ["embed", *expected, "norm", "head", "mtp_0", "mtp_0, head"]
    for name in expected:
        run, layer, part = name.replace("[", " ").replace("].", " ").split()
        params = jax.tree.map(lambda leaf: leaf, variables["params"])
        params[run][part]["norm"] = params[run][part]["norm"].at[int(layer)].set(jnp.nan)
        found = diagnosis._outputs(model, variables | {"params": params}, batch, False)
        assert list(found) == names
        assert [name for name, finite in found.items() if finite] == names[:names.index(name)]


def test_a_layer_is_seen_by_its_own_operations():
    """Where recipes differ by layer: a bundle that spoils one layer's products is that layer's output alone."""
    ops = reference_ops(row_block=4, loss_chunk=8)
    bad = dataclasses.replace(ops, mlp=lambda sites, x, *weights: jnp.nan * ops.mlp(sites, x, *weights))
    config = model_config(n_layers=3, n_dense_layers=2)
    variables, batch = random_variables(config), random_batch(config)
    for layers, place in (((ops, bad), "dense_layers[1].mlp"), ((ops, ops, bad), "moe_layers[0].moe"),
                          ((ops, ops, ops, bad), "mtp_0")):
        model = Transformer(config, dataclasses.replace(ops, layers=layers))
        found = first_nonfinite(model, variables["params"], variables["routing"], batch, False)
        assert found == f"the output of {place}"
        assert not np.isfinite(model.apply(variables, batch).mtp_D).any()


def test_layers_and_micro_batches_share_their_programs():
    """The model is traced as often for four layers as for one, and not again for the next micro-batch."""
    ops, calls = reference_ops(row_block=4, loss_chunk=8), []

    def moe(*arguments):
        calls.append(1)
        return ops.moe(*arguments)

    counted = dataclasses.replace(ops, moe=moe)
    one, four = (Transformer(dataclasses.replace(SMALLEST, n_layers=n), counted) for n in (1, 4))
    variables = random_variables(four.config)
    for program in (diagnosis._outputs, diagnosis._gradients):
        program.lower(four, variables, random_batch(four.config), False)
    traced, variables = len(calls), random_variables(one.config)
    for seed in range(3):
        batch = random_batch(one.config, seed=seed)
        assert first_nonfinite(one, variables["params"], variables["routing"], batch, False) is None
    assert 0 < traced == len(calls) - traced


@pytest.mark.slow
def test_it_needs_no_more_memory_than_a_step():
    config = dataclasses.replace(SMALLEST, n_layers=5, dim=96, remat="report")
    variables, batch, model = random_variables(config), random_batch(config), transformer(config)
    temporary = lambda program, *inputs: program.lower(*inputs).compile().memory_analysis().temp_size_in_bytes
    batches = jax.tree.map(lambda a: a[None], batch)
    step = temporary(make_train_step(recipe_of(model, TRAIN)), train_state(variables, TRAIN), batches, KNOBS)
    assert temporary(diagnosis._gradients, model, variables, batch, False) <= step
    assert temporary(diagnosis._outputs, model, variables, batch, False) <= step / 2


@pytest.mark.slow
def test_a_run_stops_after_a_few_in_a_row_and_keeps_its_last_good_checkpoint(tmp_path):
    corpus = write_corpus(tmp_path / "text")
    config = small_config(
        corpus, **ONE_LAYER | {"train.steps": "2", "train.checkpoint_every": "2", "train.log_every": "1"})
    train(config, tmp_path / "run", reference_ops())
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=50))
    broken = broken_ops("experts", backward=False)
    with pytest.raises(UserError, match=r"5 steps in a row up to step 7 .* the output of moe_layers\[0\].moe"):
        train(longer, tmp_path / "run", broken)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"2"}  # none in a bad streak
    records = [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [r["bad_steps"] for r in records] == [0, 0, 1, 2, 3, 4, 5]
    assert [r["loss_spike"] for r in records] == [False] * 2 + [True] * 5
    result = train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4)), tmp_path / "run",
                   reference_ops())
    assert int(result.state.step) == 4
