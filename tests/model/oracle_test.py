"""The whole model against float64 NumPy, for every shape of the family."""

import jax
import numpy as np
import oracle
import pytest
from tiny_models import FAMILY, distance, random_batch, random_variables, transformer


def run_oracle(config, variables, batch, segment_mask):
    params, routing = variables["params"], variables.get("routing", {})
    return oracle.forward(params, routing, config, *map(np.asarray, batch), segment_mask)


@pytest.mark.parametrize("segment_mask", [False, True], ids=["packed", "segmented"])
@pytest.mark.parametrize("name", FAMILY)
def test_model_agrees_with_the_oracle(name, segment_mask):
    """Logits, losses and expert loads: float32 against float64, norm-wise."""
    config = FAMILY[name]
    variables, batch = random_variables(config), random_batch(config)
    model = transformer(config)
    expected = run_oracle(config, variables, batch, segment_mask)

    @jax.jit
    def run(variables, batch):
        return (model.apply(variables, batch, segment_mask, method="forward"),
                model.apply(variables, batch, segment_mask))

    (logits, mtp_logits), losses = run(variables, batch)
    assert distance(logits, expected.logits_BTV) < 1e-5
    assert len(mtp_logits) == config.mtp.depth
    real = np.asarray(batch.segment_ids_BT) > 0
    for depth, (actual, wanted) in enumerate(zip(mtp_logits, expected.mtp_logits, strict=True), start=1):
        whole = np.arange(actual.shape[1]) < actual.shape[1] - depth
        keep = real & whole[None, :]
        assert distance(np.asarray(actual)[keep], wanted[keep]) < 1e-5

    np.testing.assert_allclose(losses.main, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(losses.mtp_D, expected.mtp_losses, rtol=1e-5)
    np.testing.assert_allclose(losses.balance / losses.sequences, expected.balance, rtol=1e-5)
    assert losses.load.keys() == expected.load.keys()
    for stack, load in losses.load.items():
        np.testing.assert_array_equal(load, expected.load[stack])
