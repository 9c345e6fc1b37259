"""What torch has for the same work, on the same card: cuBLASLt, cuDNN, transformers. All of it is optional.

`python -m experiments.peers_torch` measures transformers' DeepseekV3 at the slice (`benchmark slice --peers` starts it,
in a process of its own, since neither library gives memory back to the other) and prints a line of JSON.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from absl import logging

try:
    import torch
except ImportError:
    torch = None


def available() -> bool:
    """Whether peers can run; says why not."""
    if torch is None:
        logging.warning("torch is not installed: peers are left out")
    return torch is not None


def to_torch(tree):
    """Tensors that share the memory of JAX's arrays; 8-bit floats travel as bytes."""
    def convert(array: jax.Array):
        if array.dtype.itemsize == 1 and array.dtype != jnp.uint8 and array.dtype != jnp.int8:
            dtype = getattr(torch, array.dtype.name)
            return torch.from_dlpack(jax.lax.bitcast_convert_type(array, jnp.uint8)).view(dtype)
        return torch.from_dlpack(array)

    return jax.tree.map(convert, jax.block_until_ready(tree))


def to_jax(tree):
    """The inverse of `to_torch`."""
    def convert(tensor):
        tensor = tensor.detach().contiguous()
        if tensor.element_size() == 1 and tensor.dtype not in (torch.uint8, torch.int8):
            name = str(tensor.dtype).removeprefix("torch.")
            return jax.lax.bitcast_convert_type(jnp.from_dlpack(tensor.view(torch.uint8)), jnp.dtype(name))
        return jnp.from_dlpack(tensor)

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return jax.tree.map(convert, tree)


def _captured(run: Callable[[int], None], calls: int) -> Callable[[], None]:
    """`calls` calls as one CUDA graph, so that Python's launches cost nothing; as they are where that fails."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(calls)
        return graph.replay
    except RuntimeError as error:
        logging.warning("no CUDA graph of a torch peer: %s", str(error).splitlines()[0])
        torch.cuda.synchronize()
        return lambda: run(calls)


def batch(function: Callable, sets: Sequence[Sequence]) -> Callable[[int], float]:
    """A `Batch` of `benchmark_clock`: CUDA events around a graph of calls, or plain calls on a CPU."""
    def run(calls: int) -> None:
        for call in range(calls):
            function(*sets[call % len(sets)])

    graphs: dict[int, Callable[[], None]] = {}

    def timed(calls: int) -> float:
        if not torch.cuda.is_available():
            start = time.perf_counter()
            run(calls)
            return time.perf_counter() - start
        if calls not in graphs:
            run(2)
            torch.cuda.synchronize()
            graphs[calls] = _captured(run, calls)
            graphs[calls]()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graphs[calls]()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)

    return timed


def scaled_dot(a, b):
    """cuBLASLt's block-scaled product of `Tiles` [M, K] and `Blocks` or `Tiles` [N, K], in bfloat16.

    It wants scales of rows with the row fastest, which is how `Tiles` keep them, and scales of blocks in a matrix whose
    rows are a multiple of four long (`whole_fours`).
    """
    blocks = b.scales.shape[-1] != b.values.shape[0]
    scale_b = b.scales[:, :b.values.shape[1] // 128].t() if blocks else b.scales
    return torch._scaled_mm(a.values, b.values.t(), scale_a=a.scales.t(), scale_b=scale_b, out_dtype=torch.bfloat16,
                            use_fast_accum=False)


def grouped_dot(rows_JD, w_EDF, ends_E):
    """torch's grouped product in bfloat16: rows up to `ends_E[e]`, from the end before, times w[e]."""
    return torch._grouped_mm(rows_JD, w_EDF, offs=ends_E, out_dtype=torch.bfloat16)


def _cudnn_attention(q, k, v, scale: float):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [SDPBackend.CUDNN_ATTENTION] if torch.cuda.is_available() else [SDPBackend.MATH]
    with sdpa_kernel(backends):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def attention(q_BTHX, k_BTHX, v_BTHU, scale: float):
    """cuDNN's causal attention through torch: o_BTHU."""
    return _cudnn_attention(*(x.transpose(1, 2) for x in (q_BTHX, k_BTHX, v_BTHU)), scale).transpose(1, 2)


def attention_gradients(q_BTHX, k_BTHX, v_BTHU, d_o_BTHU, scale: float):
    """The same, forward and backward: o, d_q, d_k, d_v."""
    inputs = [x.detach().requires_grad_() for x in (q_BTHX, k_BTHX, v_BTHU)]
    o_BTHU = attention(*inputs, scale)
    return o_BTHU, *torch.autograd.grad(o_BTHU, inputs, d_o_BTHU)


def loss_gradients(x_TD, w_DV, targets_T):
    """Cross-entropy with all logits at once, as `benchmark_loss.gradients`: losses, bad argmaxes, d_x, d_w."""
    x, w = (a.detach().requires_grad_() for a in (x_TD, w_DV))
    logits_TV = (x @ w).float()
    nll_T = torch.nn.functional.cross_entropy(logits_TV, targets_T.long(), reduction="none")
    bad_T = (logits_TV.argmax(dim=1) >= w.shape[1]).int()
    return nll_T, bad_T, *torch.autograd.grad(nll_T.sum(), (x, w))


SLICE = dict(
    vocab_size=1024, num_hidden_layers=4, first_k_dense_replace=0, num_nextn_predict_layers=0, n_routed_experts=8,
    num_experts_per_tok=8, n_group=1, topk_group=1, use_cache=False)
"""What differs from V3 in transformers' names; its router sends every token to all 8 experts, an even load."""


def _seconds(step: Callable[[], None], repeats: int) -> float:
    """Median of synchronised calls, after two of warm-up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(2 + repeats):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure_slice(sequences: int, length: int, repeats: int, **sizes) -> dict:
    """Microseconds per token and layer of transformers' model in bfloat16: SDPA, grouped_mm experts, fused AdamW."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**(SLICE | sizes))
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = DeepseekV3ForCausalLM(config).to(torch.bfloat16).train()
        tokens = torch.randint(config.vocab_size, (sequences, length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")

    def gradients() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()

    per = 1e6 / (tokens.numel() * config.num_hidden_layers)
    gradient, update = per * _seconds(gradients, repeats), per * _seconds(optimizer.step, repeats)
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else 0.0
    return {"tokens": tokens.numel(), "layers": config.num_hidden_layers, "gradient_us": gradient,
            "optimizer_us": update, "total_us": gradient + update, "peak_gib": peak}


def slice_figures(sequences: int) -> dict | None:
    """`measure_slice` in a process of its own; None where it cannot run, with the reason as a warning."""
    if not available():
        return None
    child = subprocess.run([sys.executable, "-m", "experiments.peers_torch", str(sequences)], stdout=subprocess.PIPE,
                           text=True)
    if child.returncode:
        logging.warning("transformers at the slice failed with status %d", child.returncode)
        return None
    return json.loads(child.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure_slice(int(sys.argv[1]) if len(sys.argv) > 1 else 2, 4096, 5)))
