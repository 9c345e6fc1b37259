"""The breakdown of a step: names to kinds, the union of intervals, and a real trace of a CPU."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest

from dsv3.train.profile import IDLE, breakdown, busy_time, kind_of, operation_names

LAYER = "jit(step)/{}/moe_layers/"
FORWARD, BACKWARD = LAYER.format("jvp(Transformer)"), LAYER.format("transpose(jvp(Transformer))")


@pytest.mark.parametrize("kernel, operation, kind", [
    ("cudnn_generated_sdpa_flash_fprop", FORWARD + "attn/attention/dot_product_attention_fwd", "attention forward"),
    ("cudnn_generated_sdpa_flash_bprop", BACKWARD + "attn/attention/dot_product_attention_bwd", "attention backward"),
    ("dot.3", BACKWARD + "attn/attention/dot_general", "attention backward"),
    ("kernel_mosaic_gpu_kernel", FORWARD + "moe/experts/kernel/mpmd_map", "grouped products"),
    ("loop_fusion", FORWARD + "moe/experts/convert_element_type", "norms and elementwise"),
    ("nvjet_tst", "jit(step)/jvp(Transformer)/Transformer._head_loss/while/body/dot_general", "head and loss"),
    ("gather", FORWARD + "moe/dispatch/gather", "router, dispatch and combine"),
    ("nvjet_tst", BACKWARD + "attn/dot_general", "dense products"),
    ("loop_fusion", BACKWARD + "attn/mul", "norms and elementwise"),
    ("loop_fusion", "jit(step)/mul", "optimizer"),
    ("loop_fusion", "", "optimizer"),
    ("nvjet_tst", "", "dense products"),
    ("kernel_mosaic_gpu_kernel", "", "grouped products"),
    ("kernel_mosaic_gpu_kernel", FORWARD + "attn/kernel/mpmd_map", "dense products"),
    ("quantize_rows_mosaic_gpu_kernel", "", "quantisation"),
    ("kernel_mosaic_gpu_kernel", FORWARD + "moe/experts/quantize_rows/mpmd_map", "quantisation"),
])
def test_every_operation_has_its_kind(kernel, operation, kind):
    assert kind_of(kernel, operation) == kind


def test_names_are_read_off_a_compiled_program():
    step = jax.jit(lambda x: jnp.sin(x @ x)).lower(jnp.ones((8, 8))).compile()
    assert any("dot_general" in name for name in operation_names(step.as_text()).values())


PROGRAM = """HloModule jit_step

%sliced (p: f32[2]) -> f32[2] {
  %s.1 = f32[2]{0} dynamic-slice(%p), metadata={op_name="jit(step)/slice"}
  %g.1 = f32[2]{0} custom-call(%s.1), metadata={op_name="jit(step)/_head_loss/dot_general"}
  ROOT %u.1 = f32[2]{0} dynamic-update-slice(%g.1), metadata={op_name="jit(step)/update"}
}

%plain (p: f32[2]) -> f32[2] {
  %a.1 = f32[2]{0} negate(%p), metadata={op_name="jit(step)/first"}
  ROOT %b.1 = f32[2]{0} add(%a.1), metadata={op_name="jit(step)/last"}
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %fusion.1 = f32[2]{0} fusion(%p), kind=kCustom, calls=%sliced, metadata={scheduling_name="fusion.1"}
  %fusion.2 = f32[2]{0} fusion(%p), kind=kLoop, calls=%plain
  %fusion.3 = f32[2]{0} fusion(%p), kind=kLoop, calls=%plain, metadata={op_name="jit(step)/own"}
  ROOT %copy.1 = f32[2]{0} copy(%p)
}
"""


def test_a_nameless_fusion_is_called_by_what_it_holds():
    """A product between slices is the product; the trace shows only the fusion."""
    names = operation_names(PROGRAM)
    assert names["fusion.1"] == "jit(step)/_head_loss/dot_general" and names["fusion.2"] == "jit(step)/last"
    assert names["fusion.3"] == "jit(step)/own" and "copy.1" not in names


@hypothesis.given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_busy_time_is_the_size_of_the_union(pairs):
    covered = {second for start, length in pairs for second in range(start, start + length)}
    assert busy_time([(start, start + length) for start, length in pairs]) == len(covered)


@pytest.mark.slow
def test_a_trace_of_this_machine_is_broken_down(tmp_path):
    """The product stands under the head's scope and takes nearly all the time; two runs are averaged."""
    @jax.jit
    def step(x):
        with jax.named_scope("_head_loss"):
            return jnp.sum(x @ x)

    x = jnp.ones((1500, 1500))
    compiled = step.lower(x).compile()
    jax.block_until_ready(compiled(x))
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(2):
            jax.block_until_ready(compiled(x))
    seconds = breakdown(str(tmp_path), compiled.as_text(), 2)
    assert set(seconds) <= {"head and loss", "optimizer", IDLE}
    assert 1e-4 < seconds["head and loss"] < 10 and seconds["head and loss"] > 5 * seconds.get("optimizer", 0)
