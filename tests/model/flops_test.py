"""The arithmetic of a token against the figures published for V3."""

import pytest

from dsv3.model.flops import forward_flops_per_token, train_flops_per_token
from experiments.launch import load_config


@pytest.mark.parametrize("causal, mtp, giga", [(True, False, 250.5), (False, False, 281.2), (True, True, 260.6)])
def test_v3_costs_what_its_authors_count(causal, mtp, giga):
    config = load_config("configs/deepseek_v3_671b.py", []).model
    assert train_flops_per_token(config, 4096, causal=causal, mtp=mtp) / 1e9 == pytest.approx(giga, rel=2e-3)


def test_matrix_elements_by_hand():
    """Attention 187,105,280 elements and one expert 44,040,192, as the published shapes multiply out."""
    config = load_config("configs/deepseek_v3_671b.py", []).model
    no_context = forward_flops_per_token(config, 0, mtp=False) / 2
    gate, expert, dense, head = 256 * 7168, 3 * 7168 * 2048, 3 * 7168 * 18432, 129280 * 7168
    assert no_context == 61 * 187_105_280 + 3 * dense + 58 * (gate + 9 * expert) + head
