"""What `tune` sweeps is what training asks for: same kernels, same entries, and candidates that can run."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from interpreted import interpreter

from dsv3.kernels import attention_backward_hopper, attention_hopper, fp8_hopper, scaled_products_hopper
from dsv3.kernels.attention import causal_attention
from dsv3.kernels.scaled_warpgroups_hopper import Tuning
from dsv3.kernels.tuning import key, tuned
from experiments import benchmark_attention, benchmark_tunables
from experiments.benchmark_table import distance
from experiments.benchmark_tunables import PRODUCTS, SHARED_BYTES, TUNABLES, cost, product_candidates, shared_bytes

BY_NAME = {tunable.kernel: tunable for tunable in TUNABLES}
PRODUCT_CALLS = {
    "scaled_dot": lambda shape, f, a, b: f(a, b, shape[:2], jnp.bfloat16),
    "scaled_grouped_dot": lambda shape, f, a, b, expert_Z: f(a, b, expert_Z, jnp.bfloat16),
    "scaled_weight_gradient": lambda shape, f, a, b: f(a, b),
    "scaled_grouped_weight_gradient": lambda shape, f, *arguments: f(*arguments),
}


@pytest.fixture
def asked(monkeypatch):
    """What the kernels look up in the table, and what they take where it has nothing."""
    found = []

    def tuned(kind, kernel, shape, default):
        found.append((kernel, tuple(shape), default))
        return default

    for module in (fp8_hopper, scaled_products_hopper):
        monkeypatch.setattr(module, "tuned", tuned)
    return found


@pytest.mark.parametrize("kernel", PRODUCT_CALLS)
def test_a_product_asks_for_the_entry_that_was_swept(asked, kernel, monkeypatch):
    """At the sizes that were measured; its default is the first candidate. The kernels themselves are left out: tracing
    them is slow."""
    monkeypatch.setattr(scaled_products_hopper, "rows_times_blocks", lambda a, b, experts, out, tuning: a.scales)
    monkeypatch.setattr(scaled_products_hopper, "weight_gradient", lambda a, b, start, steps, tuning: a.scales)
    function = partial(getattr(scaled_products_hopper, kernel), kind="H100")
    for shape in BY_NAME[kernel].shapes:
        arrays = jax.eval_shape(lambda shape=shape: BY_NAME[kernel].inputs(shape, 0))
        jax.eval_shape(partial(PRODUCT_CALLS[kernel], shape, function), *arrays)
        assert asked.pop() == (kernel, shape, BY_NAME[kernel].candidates(shape)[0]) and not asked


def test_a_stream_asks_for_the_entry_that_was_swept(asked):
    from dsv3.kernels.fp8_kernels import REFERENCE
    from experiments.benchmark_rows import FORMS
    from experiments.benchmark_tunables import STREAMS

    for name in STREAMS:
        form = FORMS[name]
        tunable, fast = BY_NAME[form.function], fp8_hopper.FAST[form.function]
        for shape in tunable.shapes:
            entries = []

            def noted(*arguments, fast=fast, entries=entries, form=form):
                entries.append(fast.entry(*arguments))
                return getattr(REFERENCE, form.function)(*arguments)

            arrays = jax.eval_shape(lambda shape=shape, tunable=tunable: tunable.inputs(shape, 0))
            jax.eval_shape(partial(form.call, noted), *arrays)
            assert entries == [shape], name
            assert tunable.candidates(shape)[0] == fast.default


def test_every_tile_of_decoding_fits():
    assert all(shared_bytes(tuning, 2, column_scales=False) <= SHARED_BYTES
               for tuning in scaled_products_hopper.HALVES + scaled_products_hopper.WHOLE)


@pytest.mark.parametrize("m, n, widths", [
    (128, 640, [16, 32, 48, 64]), (128, 2176, [48, 64, 96, 128]), (64, 2176, [32, 48, 64, 96]), (128, 7168, [128]),
    (64, 7168, [64, 96, 128]), (128, 24_576, [96, 128])])
def test_few_rows_are_tried_in_tiles_of_half_the_height_that_run_all_at_once(m, n, widths):
    """Or, where none do, in the widest."""
    tried = [tuning for tuning in product_candidates(m, n, Tuning(16, 11), 2) if tuning.rows == 64]
    assert [tuning.width for tuning in tried] == widths


def test_every_kernel_of_training_is_swept():
    attention = {"attention_forward", "attention_backward"}
    assert set(BY_NAME) == {*fp8_hopper.FAST, *PRODUCT_CALLS, *attention} and len(BY_NAME) == len(TUNABLES)


@pytest.mark.slow
@pytest.mark.parametrize("module, kernel", [
    (attention_hopper, "attention_forward"), (attention_backward_hopper, "attention_backward")])
def test_candidates_of_attention_start_with_the_default_and_lower(module, kernel):
    """Shared memory is counted when a kernel is lowered."""
    tunable = BY_NAME[kernel]
    candidates = tunable.candidates((2048,))
    assert candidates[0] == module.Settings() and len(set(candidates)) == len(candidates) >= 3
    arrays = jax.eval_shape(lambda: tunable.inputs((2048,), 0))
    for how in candidates:
        jax.jit(tunable.make((2048,), how)).trace(*arrays).lower(lowering_platforms=("cuda",))


def test_the_reference_of_attention_agrees_with_the_parts():
    """o, d_q, d_kv and d_k_rope of whole heads against the reference's own gradients."""
    q, kv, k_rope, _, d_o, _ = benchmark_attention.inputs_of(0, 1, 32, 8, segments=False)
    o, d_q, d_kv, d_k_rope = benchmark_tunables.attention_expected(q, q[..., 128:], kv, k_rope, d_o)
    attend = lambda *parts: causal_attention(*parts, scale=benchmark_attention.SCALE, segment_ids_BT=None)
    parts = (q[..., :128], q[..., 128:], kv[..., :128], k_rope, kv[..., 128:])
    want, vjp = jax.vjp(attend, *(part.astype(jnp.float32) for part in parts))
    found = (o, d_q[..., :128], d_q[..., 128:], d_kv[..., :128], d_k_rope, d_kv[..., 128:])
    for got, wanted in zip(found, (want, *vjp(d_o.astype(jnp.float32))), strict=True):
        assert distance(got, wanted) < 1e-5


def test_fast_forms_take_the_settings_of_the_table(monkeypatch):
    seen, settings = [], fp8_hopper.FAST["quantize_rows"].default._replace(stages=7)
    monkeypatch.setattr(fp8_hopper, "tuned", lambda kind, kernel, shape, default: settings)
    fast = fp8_hopper.FAST["quantize_rows"]._replace(
        function=lambda x, operand, settings: seen.append((operand, settings)) or x)
    monkeypatch.setitem(fp8_hopper.FAST, "quantize_rows", fast)
    fp8_hopper.with_settings("quantize_rows", "H100")(jnp.zeros((128, 128)), "an operand")
    assert seen == [("an operand", settings)]


def test_candidates_fit_into_shared_memory_start_with_the_default_and_differ():
    for tunable in PRODUCTS:
        gradient = "gradient" in tunable.kernel
        for shape in tunable.shapes:
            candidates = tunable.candidates(shape)
            assert len(set(candidates)) == len(candidates) >= 3
            for tuning in candidates:
                bytes_ = shared_bytes(tuning, 4 if gradient else 2, column_scales=gradient)
                assert 64 * 1024 < bytes_ <= SHARED_BYTES
                assert tunable.kernel != "scaled_grouped_dot" or tuning.pair != "b", "two experts may be neighbours"
    too_large = Tuning(192, 6, None, 8)
    assert shared_bytes(too_large, 2, column_scales=False) > SHARED_BYTES
    assert too_large not in product_candidates(4096, 7168, too_large, 2)


def test_a_width_that_fills_the_last_round_is_tried():
    """132 tiles of 128 x 176: one round; of any other width more columns in all."""
    m, n = 12 * 128, 11 * 176
    assert min(benchmark_tunables.WIDTHS, key=partial(cost, m, n)) == 176
    assert 176 in {tuning.width for tuning in product_candidates(m, n, Tuning(), 2)}


def test_the_references_of_the_products_agree_with_the_models(monkeypatch):
    """`expected` of each, on small shapes, against the reference forms of training."""
    from dsv3.kernels import scaled_dot

    monkeypatch.setattr(benchmark_tunables, "GRADIENT_TOKENS", 256)
    small = {"scaled_dot": (70, 256, 128), "scaled_grouped_dot": (3, 200, 128, 256),
             "scaled_weight_gradient": (128, 256)}
    for kernel, shape in small.items():
        inputs = BY_NAME[kernel].inputs(shape, 0)
        expected = PRODUCT_CALLS[kernel](shape, getattr(scaled_dot, kernel), *inputs)
        assert distance(BY_NAME[kernel].expected(shape, *inputs), expected) < 0.004, kernel
    a, b = benchmark_tunables.random_tiles(0, 128, 384), benchmark_tunables.random_tiles(1, 256, 384)
    extent = jnp.array([0, 128, 256]), jnp.array([1, 1, 1])
    assert distance(BY_NAME["scaled_grouped_weight_gradient"].expected((), a, b, *extent),
                    scaled_dot.scaled_grouped_weight_gradient(a, b, *extent)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("width", [96, 112, 144, 160, 176])
def test_other_widths_than_the_defaults_multiply(width):
    shape = 128, 256, 256
    a, b = benchmark_tunables.random_tiles(0, 128, 256), benchmark_tunables.random_blocks(1, 256, 256)
    with interpreter():
        actual = jax.block_until_ready(benchmark_tunables.dense_dot(shape, Tuning(width, 3, None, 8))(a, b))
    assert distance(actual, BY_NAME["scaled_dot"].expected(shape, a, b)) < 0.004


@pytest.mark.parametrize("tunable", TUNABLES, ids=lambda tunable: tunable.kernel)
def test_what_is_swept_may_be_in_the_table(tunable):
    shape = tunable.shapes[0]
    default, *_ = candidates = tunable.candidates(shape)
    for how in candidates:
        table = {"H100": {tunable.kernel: {key(shape): {"parameters": how._asdict()}}}}
        assert tuned("H100", tunable.kernel, shape, default, table) == how
