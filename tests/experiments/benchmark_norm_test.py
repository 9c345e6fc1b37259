"""The table of RMSNorm: what runs here is right, and what does not computes the same shapes in one kernel."""

import jax
import pytest

from experiments.benchmark_norm import FORMS, cases, norm_cases
from experiments.benchmark_table import bad, measure


@pytest.mark.parametrize("case", norm_cases(24, 256), ids=["forward", "backward"])
def test_the_reference_and_the_kernel(case):
    plain = case._replace(contestants={"XLA": case.contestants["XLA"]})
    row = measure(plain, 1e10, False, soak=1)
    assert row["rows"] and bad(plain, row) == [] and row["errors"] == {}
    inputs = case.contestants["one read"].prepare(*case.inputs(0))
    fast, slow = (jax.eval_shape(case.contestants[form].run, *inputs) for form in FORMS)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), fast) == jax.tree.map(lambda a: (a.shape, a.dtype), slow)
    lowered = jax.jit(case.contestants["one read"].run).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu") == 1


def test_the_bytes_are_those_of_one_read():
    """x and the result, or x and both gradients, of two bytes each."""
    for case in cases():
        m, k = map(int, case.name.split(" x "))
        assert case.bytes == {"forward": 4, "backward": 6}[case.group] * m * k
