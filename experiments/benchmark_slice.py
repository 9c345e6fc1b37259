"""The honest benchmark of one GPU: four layers of DeepSeek-V3 with the work that an expert-parallel rank receives.

    python -m experiments.benchmark slice [--config.FIELD=VALUE ...] [--peers] [--profile=DIR]

V3's own widths, 4 MoE layers with 8 local experts and one shared expert, no dense layer, no MTP; 16,384 tokens a step
in sequences of 4,096, 8 expert rows a token: the arithmetic of one GPU of the report's cluster (section 3.2), without
its communication. The vocabulary is 1,024, because V3's own would take 26 GB of state by itself. Rows travel the
general path, shuffled and unequal over experts (`with_draws`).

Memory (80 GB): a layer has 583.6M parameters (attention 187.1M, 8 experts 352.3M, the shared one 44.0M), so masters are
9.4 GB, float32 gradients 9.4, bfloat16 moments 9.4: 28.2 GB with embedding and head. Activations in bfloat16 under
`remat=report` are 255 kB a token and layer (rows of `down` 115, of `gate_up` 66, attention 33, the block's two inputs
29, the rest 13): 16.7 GB for 16,384 tokens at once, half of that for 8,192. Two micro-batches need a second set of
gradients (9.4 GB) and a pass that adds it, so one is faster wherever it fits. The moments are born after the gradients
were measured; the optimizer then runs on the same gradients.

As compiled for an H100, without cuDNN's scratch, forward and backward take 8.8 GiB of weights, 8.8 of gradients and
24.9 besides (2 x 8,192 tokens: 17.4), and the optimizer 26.3 in all. With four layers in one scan step XLA merges what
`report` would compute again with what was computed first, so `report` and `none` are one program; with one layer a scan
step they are two, of 25.0 and 40.0 GiB besides.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dsv3.config import Config, ModelConfig, require
from dsv3.model.batch import Batch
from dsv3.model.flops import attention_matrices, moe_matrices, train_flops_per_token
from dsv3.model.ops import Ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import make_mesh
from dsv3.parallel.ops import make_ops
from dsv3.train.optimizer import adamw
from dsv3.train.profile import breakdown
from dsv3.train.step import make_recipe
from dsv3.train.throughput import peak_flops
from experiments import launch, peers_torch
from experiments.benchmark_record import record, write_json
from experiments.benchmark_step import TRACED, WARM_UP, random_batches

BASE = "configs/deepseek_v3_671b.py"
SLICE = (
    "model.vocab_size=1024", "model.n_layers=4", "model.n_dense_layers=0", "model.mtp.depth=0", "model.scan_unroll=4",
    "model.moe.n_routed_experts=8", "model.moe.n_expert_groups=1", "model.moe.n_limited_groups=1",
    "train.micro_batch_size=4", "train.batch_increment=4", "train.batch_size.0.start=4", "train.batch_size.0.end=4",
    "train.batch_size.1.start=4", "train.batch_size.1.end=4", "data.tokenizer=bytes", "kernels=require",
)
"""What makes the slice of V3; any of it can be given anew: --config.train.micro_batch_size=2 for 2 x 8,192 tokens."""
SKEW = 0.3
"""Experts' shares run from 1 - SKEW to 1 + SKEW of an even load."""
DRAWS = 4
FP8_FLOPS, BF16_FLOPS = 1979e12, 989.5e12
"""The data sheet's dense rates of H100, H200 and H800: what the floor is counted on."""
PEER = "transformers 5.17 with torch 2.11: grouped_mm experts, bfloat16, fused AdamW included"
PEER_MICROSECONDS, PEER_SEQUENCES = 12.4, 2
"""Microseconds per token and layer, measured on an H100 with 2 x 4,096 tokens; `--peers` measures it again."""


def slice_config(overrides: Sequence[str]) -> Config:
    """V3 cut down to the slice, then `overrides`."""
    given = {text.partition("=")[0] for text in overrides}
    return launch.load_config(BASE, [*(text for text in SLICE if text.partition("=")[0] not in given), *overrides])


def expert_draws(n_draws: int, n_tokens: int, n_choices: int, n_experts: int) -> np.ndarray:
    """int32 [N, T, K]: experts drawn with repetition, the fullest with 1 + SKEW times the mean, another in every draw.

    A rank of an expert-parallel group does not choose: what it receives for a token may go to one local expert or
    several, and some of its experts are fuller than others.
    """
    rng = np.random.default_rng(0)
    shares = np.linspace(1 - SKEW, 1 + SKEW, n_experts) / n_experts
    draw = lambda: rng.choice(n_experts, (n_tokens, n_choices), p=rng.permutation(shares))
    return np.stack([draw() for _ in range(n_draws)]).astype(np.int32)


def with_draws(ops: Ops, draws_NTK: jax.Array) -> Ops:
    """`ops` whose rows go where a draw says. The router runs as ever; its choice picks which draw.

    So nothing of the router can be left out, and no plan can be made once for all layers.
    """
    def moe(h_TD: jax.Array, topk_TK: jax.Array, *rest):
        return ops.moe(h_TD, draws_NTK[jnp.sum(topk_TK[:, 0]) % len(draws_NTK)], *rest)

    of_layer = {own: with_draws(own, draws_NTK) for own in ops.layers}  # layers alike stay alike
    return dataclasses.replace(ops, moe=moe, layers=tuple(of_layer[own] for own in ops.layers))


class Gradients(NamedTuple):
    """Of one step: float32 gradients of all parameters, the loss in nats per token, and pairs per router's choice."""

    grads: chex.ArrayTree
    loss: jax.Array
    load: dict[str, jax.Array]


def make_gradients(config: Config, ops: Ops) -> Callable[..., Gradients]:
    """(params, routing, batches [M, B, T], draws [M, N, B * T, K]) -> `Gradients` summed over micro-batches."""
    def gradients(params, routing, batches: Batch, draws: jax.Array) -> Gradients:
        tokens, sequences = batches.tokens_BT.size, batches.tokens_BT.size // config.train.seq_len

        def objective(params, batch, draws_NTK):
            model = Transformer(config.model, with_draws(ops, draws_NTK))
            losses = model.apply({"params": params, "routing": routing}, batch)
            loss = losses.main / tokens
            return loss + config.train.balance_alpha * losses.balance / sequences, (loss, losses.load)

        def micro_step(inputs) -> Gradients:
            return Gradients(*(lambda grads, rest: (grads, *rest))(*jax.grad(objective, has_aux=True)(params, *inputs)))

        if len(draws) == 1:
            return micro_step(jax.tree.map(lambda a: a[0], (batches, draws)))
        add = lambda sums, inputs: (jax.tree.map(jnp.add, sums, micro_step(inputs)), None)
        shapes = jax.eval_shape(micro_step, jax.tree.map(lambda a: a[0], (batches, draws)))
        return jax.lax.scan(add, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), (batches, draws))[0]

    return gradients


def make_update(config: Config) -> Callable:
    """(params, opt_state, grads) -> (params, opt_state): AdamW as in training, which keeps the old on bad numbers."""
    optimizer = adamw(config.train.optimizer)

    def update(params, opt_state, grads):
        updates, new_state = optimizer.update(grads, opt_state, params)
        new_params = jax.tree.map(lambda p, u: p - jnp.float32(1e-6) * u, params, updates)
        finite = jnp.isfinite(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), (new_params, new_state), (params, opt_state))

    return update


class Inputs(NamedTuple):
    """What `make_gradients` takes."""

    params: chex.ArrayTree
    routing: chex.ArrayTree
    batches: Batch
    draws: jax.Array


def make_inputs(config: Config, ops: Ops) -> Inputs:
    recipe = make_recipe(Transformer(config.model, ops), config.train, False, make_mesh(config.mesh))

    def born(seed):
        state = nn.unbox(recipe.initial_state(seed))
        return state.params, state.routing

    batches, moe = jax.tree.map(jnp.asarray, random_batches(config)), config.model.moe
    n_micro, rows, length = batches.tokens_BT.shape
    draws = expert_draws(n_micro * DRAWS, rows * length, moe.n_activated_experts, moe.n_routed_experts)
    return Inputs(*jax.jit(born)(np.uint32(0)), batches, jnp.asarray(draws.reshape(n_micro, DRAWS, *draws.shape[1:])))


def floor_microseconds(config: ModelConfig, seq_len: int) -> float:
    """Per token and layer, if all products ran at the FP8 peak and the attention core at that of bfloat16: 2.4 for V3.

    Three products a matrix (the router's not counted); the core's backward pass forms the scores again: two products
    of 192 + 128 columns forward, five of 3 x 192 + 2 x 128 backward, over the causal half.
    """
    c = config.attention
    matrices = attention_matrices(config) + moe_matrices(config) - config.dim * config.moe.n_routed_experts
    core = seq_len * c.n_heads * (4 * c.qk_head_dim + 3 * c.v_head_dim) / 2
    return 1e6 * (6 * matrices / FP8_FLOPS + 2 * core / BF16_FLOPS)


def say(what: str) -> None:
    """What is under way: each takes from ten seconds to a minute."""
    print(f"{what} ...", file=sys.stderr, flush=True)


def peak_gib() -> float:
    """Of this process so far; 0 where the backend does not count."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2 ** 30


def timed(step: Callable, repeats: int) -> list[float]:
    """Sorted seconds of `repeats` calls of `step`, which blocks until done; warmed up before."""
    times = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return sorted(times[WARM_UP:])


def profiled(lowered: jax.stages.Lowered, inputs: Inputs, directory: str) -> dict[str, float]:
    """Seconds by kind; without CUDA graphs, inside which kernels do not say what they belong to."""
    on_gpu = jax.devices()[0].platform == "gpu"
    step = lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""} if on_gpu else None)
    jax.block_until_ready(step(*inputs))
    with jax.profiler.trace(directory):
        for _ in range(TRACED):
            jax.block_until_ready(step(*inputs))
    kinds = breakdown(directory, step.as_text(), TRACED)
    return {"unnamed" if kind == "optimizer" else kind: seconds for kind, seconds in kinds.items()}


def measure_gradients(config: Config, ops: Ops, inputs: Inputs, repeats: int, directory: str) -> tuple[dict, Gradients]:
    """Times, memory and breakdown of forward and backward, and the last gradients."""
    say("lowering and compiling forward and backward")
    lowered = jax.jit(make_gradients(config, ops)).lower(*inputs)
    start = time.perf_counter()
    step = lowered.compile()
    compile_seconds = time.perf_counter() - start
    kept = []

    def run():
        kept.clear()  # before the next gradients are born: 9.4 GB
        kept.append(jax.block_until_ready(step(*inputs)))

    say(f"compiled in {compile_seconds:.0f} s; {WARM_UP + repeats} steps")
    times = timed(run, repeats)
    figures = {"gradient_seconds": statistics.median(times), "fastest_seconds": times[0], "slowest_seconds": times[-1],
               "compile_seconds": compile_seconds, "gradient_peak_gib": peak_gib()}
    kept.clear()
    say(f"{figures['gradient_seconds']:.3f} s a step; compiling without CUDA graphs for a profile")
    figures["breakdown_seconds"] = profiled(lowered, inputs, directory)
    run()
    return figures, kept[0]


def measure_update(config: Config, params: chex.ArrayTree, grads: chex.ArrayTree, repeats: int) -> dict:
    """Times of the optimizer on one set of gradients. Consumes `params`."""
    state = [params, jax.jit(adamw(config.train.optimizer).init)(params)]
    update = jax.jit(make_update(config), donate_argnums=(0, 1)).lower(*state, grads).compile()

    def run():
        state[:] = jax.block_until_ready(update(*state, grads))

    return {"optimizer_seconds": statistics.median(timed(run, repeats)), "peak_gib": peak_gib()}


def per_token_and_layer(config: Config, times: dict) -> dict[str, float]:
    """The reported figures, from the seconds of `measure_gradients` and `measure_update`."""
    model, length = config.model, config.train.seq_len
    tokens = int(config.train.batch_size[-1].end) * length
    micro = 1e6 / (tokens * model.n_layers)
    gradient, optimizer = times["gradient_seconds"] * micro, times["optimizer_seconds"] * micro
    floor, flops = floor_microseconds(model, length), train_flops_per_token(model, length) * tokens
    return {
        "tokens": tokens, "layers": model.n_layers, "gradient_us": gradient, "optimizer_us": optimizer,
        "total_us": gradient + optimizer, "floor_us": floor, "floor_share": floor / gradient,
        "tokens_per_second": tokens / (times["gradient_seconds"] + times["optimizer_seconds"]),
        "tflops": 1e-12 * flops / times["gradient_seconds"], "mfu": flops / times["gradient_seconds"] / peak_flops(),
        "breakdown_us": {kind: seconds * micro for kind, seconds in times["breakdown_seconds"].items()},
        "peer_us": PEER_MICROSECONDS, "peer": PEER,
    }


def load_skew(draws: jax.Array, n_experts: int) -> float:
    """Largest load over the mean, averaged over draws."""
    counts = np.stack([np.bincount(draw.ravel(), minlength=n_experts) for draw in np.asarray(draws)])
    return float(np.mean(counts.max(axis=1) / counts.mean(axis=1)))


def show(figures: dict) -> None:
    f = figures
    print(f"{f['tokens']:,} tokens through {f['layers']} layers, {f['micro_batches']} micro-batch(es), recomputation "
          f"{f['remat']}, fullest expert {f['skew']:.2f} times the mean; compiled in {f['compile_seconds']:.0f} s\n")
    print(f"forward and backward {f['gradient_us']:.2f} us per token and layer ({f['floor_share']:.0%} of the floor of "
          f"{f['floor_us']:.2f} us), optimizer {f['optimizer_us']:.2f}, together {f['total_us']:.2f} us "
          f"({PEER}: {f['peer_us']:.1f})")
    print(f"{f['tokens_per_second']:,.0f} tokens/s with the optimizer; {f['tflops']:.0f} TFLOP/s, MFU {f['mfu']:.1%} "
          f"without; peak {f['gradient_peak_gib']:.1f} GiB, with the optimizer {f['peak_gib']:.1f}; "
          f"loss {f['loss']:.4f}\n")
    for kind, micro in f["breakdown_us"].items():
        print(f"{micro:8.3f} us  {kind}")
    if f["peer_measured"]:
        peer = f["peer_measured"]
        print(f"\ntransformers, measured now: {peer['gradient_us']:.2f} + {peer['optimizer_us']:.2f} us, "
              f"{peer['peak_gib']:.1f} GiB, {peer['tokens']:,} tokens a step")


def measure(config: Config, repeats: int, directory: str) -> dict:
    ops = make_ops(config.kernels, config.recipe)
    inputs = make_inputs(config, ops)
    times, gradients = measure_gradients(config, ops, inputs, repeats, directory)
    skew = load_skew(inputs.draws.reshape(-1, *inputs.draws.shape[2:]), config.model.moe.n_routed_experts)
    loss, n_micro = float(gradients.loss), len(inputs.draws)
    require(np.isfinite(loss), f"the loss is {loss}: no timing of wrong numbers")
    say("the optimizer")
    times |= measure_update(config, inputs.params, gradients.grads, repeats)
    return {"remat": config.model.remat, "micro_batches": n_micro, "skew": skew, "loss": loss,
            "seconds": times, "compile_seconds": times["compile_seconds"],
            "gradient_peak_gib": times["gradient_peak_gib"], "peak_gib": times["peak_gib"],
            **per_token_and_layer(config, times)}


def main(overrides: Sequence[str]) -> None:
    config = slice_config(overrides)
    require(config.mesh.n_devices == 1, "`benchmark slice` is of one device; leave mesh.data at 1")
    if flags.FLAGS.peers:
        say("transformers' model, in a process of its own")
    peers = peers_torch.slice_figures(PEER_SEQUENCES) if flags.FLAGS.peers else None  # before our memory is taken
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(config, flags.FLAGS.steps, flags.FLAGS.profile or scratch)
    result = record("slice", {"overrides": list(overrides), **figures, "peer_measured": peers})
    print(f"{result['device']}, {result['versions']}")
    show(result)
    write_json(result)
