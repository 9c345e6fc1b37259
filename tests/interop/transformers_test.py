"""Models of ours, exported by `dsv3.interop`, compute in transformers what they compute here.

The other direction needs no torch: `conformance_test.py`. This one runs where `pip install 'dsv3[interop]'` was done.
"""

import dataclasses
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from tiny_models import FAMILY, random_batch, random_variables, transformer

from dsv3.interop.export import export, flatten
from dsv3.interop.load import load

for package in ("torch", "transformers", "safetensors"):
    pytest.importorskip(package, reason="torch and transformers are another gigabyte: pip install 'dsv3[interop]'")

NAMES = ("v3", "v3_yarn", "yarn_unequal_mscale", "no_query_compression", "one_group", "v2_greedy", "v2_groups",
         "no_dense_layer", "mtp_depth_two")


def theirs(folder, tokens_T, depths):
    """Logits [T, V] of the main model, and [T - k, V] of every MTP depth k, by transformers."""
    import torch
    from goldens.make_hf_goldens import load
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel
    with torch.no_grad():
        model = load(folder)
        ids = torch.tensor(tokens_T, dtype=torch.long)[None]
        hidden, ahead = model.model(ids).last_hidden_state, []
        module = MtpModel.from_pretrained(model).eval() if depths > 0 else None
        for k in range(1, depths + 1):
            cache, positions = MtpCache(config=model.config.get_mtp_config()), torch.arange(k, ids.shape[1])[None]
            hidden_k = ahead[-1] if ahead else hidden
            ahead.append(module.forward_layer(k - 1, hidden_k[:, :-1], positions, cache, input_ids=ids[:, k:]))
        return model(ids).logits[0].numpy(), [module._project_to_logits(state)[0].numpy() for state in ahead]


def worst(actual_TV, expected_TV):
    """The largest |actual - expected| / |expected| of a position."""
    difference = np.linalg.norm(np.asarray(actual_TV, np.float64) - expected_TV, axis=-1)
    return float(np.max(difference / np.linalg.norm(expected_TV, axis=-1)))


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_computes_the_same_there(name, tmp_path):
    config = FAMILY[name]
    if config.moe.score_func == "softmax":  # V2 has no MTP modules
        config = dataclasses.replace(config, mtp=dataclasses.replace(config.mtp, depth=0))
    variables, batch = random_variables(config), random_batch(config, batch=1, length=40)
    export(config, flatten(variables), tmp_path / "hf", dtype="float32", base=dict(
        max_position_embeddings=4096, bos_token_id=0, eos_token_id=1))
    model = transformer(config)
    ours, ahead = jax.jit(lambda v, b: model.apply(v, b, method="forward"))(variables, batch)
    logits_TV, expected = theirs(tmp_path / "hf", np.asarray(batch.tokens_BT[0]), config.mtp.depth)
    figures = [worst(ours[0], logits_TV)]
    for k, (deeper_BTV, wanted) in enumerate(zip(ahead, expected, strict=True), start=1):
        figures.append(worst(deeper_BTV[0, :-k], wanted))
    assert max(figures) < 2e-5


@pytest.mark.parametrize("name", ["v3_yarn", "moonlight", "v2_groups"])
def test_what_transformers_saves_is_read(name, tmp_path):
    """It writes another `config.json` (rope_parameters, keys of its own), and the same weights."""
    from goldens.make_hf_goldens import load as load_there
    golden = Path(__file__).parents[1] / "goldens" / "hf" / name
    load_there(golden).save_pretrained(tmp_path)
    (config, variables), (saved_config, saved) = load(golden), load(tmp_path)
    assert dataclasses.replace(saved_config, dtype=config.dtype) == config and saved_config.dtype == "float32"
    chex.assert_trees_all_equal(saved, variables)
