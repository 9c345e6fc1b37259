"""A third program on the same checkpoints: llama.cpp's log-probabilities are ours.

Only what it can do: no missing query compression, no unequal mscales, no V2 groups. It runs where gguf and xllamacpp
are installed (`pip install 'dsv3[interop]'`).
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.interop.load import load
from dsv3.model.batch import Batch
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer

for package in ("gguf", "xllamacpp"):
    pytest.importorskip(package, reason="needs gguf and xllamacpp: pip install 'dsv3[interop]'")

GOLDENS = Path(__file__).parents[1] / "goldens" / "hf"


def ours(checkpoint, tokens_T):
    """Our log-probabilities [T, V], and the configuration they belong to."""
    config, variables = load(checkpoint)
    config = dataclasses.replace(config, dtype="float32")
    tokens_BT = jnp.asarray(tokens_T)[None]
    batch = Batch(tokens_BT, tokens_BT, jnp.ones(tokens_BT.shape), jnp.ones_like(tokens_BT))
    model = Transformer(config, reference_ops(row_block=4))
    logits_BTV, _ = jax.jit(lambda v, b: model.apply(v, b, method="forward"))(variables, batch)
    return jax.nn.log_softmax(logits_BTV[0]), config


def theirs(path, yarn, tokens_T, vocab_size):
    """llama.cpp's log-probabilities after every prefix, float32 cache."""
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 256, 1, False
    params.n_gpu_layers, params.verbosity, params.cpuparams.n_threads = 0, 1, 1
    params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if yarn is not None:  # the defaults of this binding, 32 and 1, come before what the file says
        params.yarn_beta_fast, params.yarn_beta_slow = yarn.beta_fast, yarn.beta_slow
    server, rows = xllamacpp.Server(params), []
    for stop in range(1, len(tokens_T) + 1):
        answer = server.handle_completions({
            "prompt": tokens_T[:stop].tolist(), "n_predict": 1, "n_probs": vocab_size, "temperature": 0,
            "cache_prompt": False})
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        assert len(top) == vocab_size
        rows.append([entry["logprob"] for entry in sorted(top, key=lambda entry: entry["id"])])
    return np.array(rows)


@pytest.mark.parametrize("name", ["v3", "v3_yarn", "kimi_k2"])
def test_log_probabilities_are_those_of_llama_cpp(name, tmp_path):
    from interop.gguf_file import write_gguf
    tokens_T = np.load(GOLDENS / name / "expected.npz")["tokens"]
    expected_TV, config = ours(GOLDENS / name, tokens_T)
    write_gguf(GOLDENS / name, config, tmp_path / "model.gguf")
    actual_TV = theirs(tmp_path / "model.gguf", config.attention.yarn, tokens_T, config.vocab_size)
    np.testing.assert_allclose(actual_TV, expected_TV, atol=3e-4, rtol=0)
