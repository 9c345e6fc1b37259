"""A run in 8 bits: the whole loop with `quant=fp8`, beside the same run without."""

import numpy as np
import pytest
from small_runs import ONE_LAYER, read_lines, small_config, write_corpus

from dsv3.config import UserError, override
from dsv3.parallel.ops import make_ops
from dsv3.train.loop import train

STEPS = 30


def losses(config, workdir):
    train(config, workdir, make_ops(config.kernels, config.recipe))
    return np.array([record["loss"] for record in read_lines(workdir / "metrics.jsonl") if "loss" in record])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_run_learns_as_without_quantisation(tmp_path):
    """30 steps on the same data: the loss falls by a third, and stays within 1% of the unquantised run's, not on it."""
    config = small_config(
        write_corpus(tmp_path / "text"), **ONE_LAYER | {
            "train.steps": str(STEPS), "train.eval_every": str(STEPS), "train.checkpoint_every": str(STEPS),
            "train.warmup_steps": "5", "model.dtype": "bfloat16"})
    plain = losses(config, tmp_path / "bf16")
    quantised = losses(override(config, {"quant": "fp8"}), tmp_path / "fp8")
    assert quantised[-1] < 0.67 * quantised[0]
    apart = np.abs(quantised - plain) / plain
    assert 0 < apart[1:].min() and apart.max() < 0.01
    with pytest.raises(UserError, match="another configuration .*quant: 'fp8' != 'fp8_direct'"):
        changed = override(config, {"quant": "fp8_direct"})
        train(changed, tmp_path / "fp8", make_ops(changed.kernels, changed.recipe))
