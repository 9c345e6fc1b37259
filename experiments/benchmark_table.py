"""One table of kernels: every case with all who compute it, ours first, checked and timed in the same run.

A command is a list of `Case`; another kernel is another row of its `contestants`. Peers are torch functions, run where
torch is installed and `--peers` is given.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags, logging

from dsv3.config import require
from dsv3.parallel.ops import is_hopper
from experiments import peers_torch
from experiments.benchmark_clock import compiled, copies_needed, device_seconds, jax_batch, n_bytes, seconds
from experiments.benchmark_record import record, write_json

BOUND = 0.01
"""Largest accepted norm-wise distance to a float32 reference; rounding to bfloat16 alone gives 0.002 to 0.005."""
FP8_FLOPS, BF16_FLOPS = 1979e12, 989.5e12
"""The data sheet's dense rates of H100, H200 and H800."""


class Contestant(NamedTuple):
    """One way to compute a case.

    `run` and `expected` (a float32 reference) take what `prepare` makes of the case's inputs, which is not timed. The
    result must lie within `bound` of the expected, norm-wise. 0 asks for the same bits, with all NaNs alike: then the
    reference runs on the host, whose division is IEEE's. torch's `run` gets tensors. `repeats`: whether it must
    give the same bits again.
    """

    run: Callable
    expected: Callable
    prepare: Callable = lambda *inputs: inputs
    bound: float = BOUND
    library: Literal["jax", "torch"] = "jax"
    repeats: bool = True


class Case(NamedTuple):
    """A shape: `inputs(seed)` draws its arrays, `flops` and `bytes` are what it must compute and move.

    `peak` is the FLOP/s that its floor is counted on. Ratios compare with the first contestant; their geometric mean is
    taken over a `group`. `like` is the group whose case of the same name has the same work in even parts (`costs`), and
    `n_rows` counts the rows that are passed over, padding included.
    """

    group: str
    name: str
    inputs: Callable[[int], tuple]
    contestants: dict[str, Contestant]
    flops: float
    bytes: float
    peak: float
    like: str | None = None
    n_rows: int | None = None


class Entry(NamedTuple):
    """A contestant ready to run: its program and its sets of inputs, as its library takes them."""

    program: Any
    sets: list
    contestant: Contestant


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


@jax.jit
def _norms(actual: jax.Array, expected: jax.Array) -> tuple[jax.Array, jax.Array]:
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm((actual - expected).ravel()), jnp.linalg.norm(expected.ravel())


def distance(actual, expected) -> float:
    """||actual - expected|| / ||expected||, the largest over the arrays of two trees; NaN where any has one."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    norms = [tuple(map(float, _norms(*pair))) for pair in pairs]
    ratios = [math.inf if error and not size else error / (size or 1.0) for error, size in norms]
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)


def poison(shapes) -> None:
    """Fill as much memory as `shapes` with NaN and free it: what a kernel forgets to write then shows."""
    def bad(leaf):
        integer = jnp.issubdtype(leaf.dtype, jnp.integer)
        return jnp.full(leaf.shape, jnp.iinfo(leaf.dtype).max if integer else jnp.nan, leaf.dtype)

    for array in jax.block_until_ready(jax.tree.leaves(jax.tree.map(bad, shapes))):
        array.delete()


def check(entry: Entry, expected, soak: int) -> tuple[float, bool]:
    """Distance of one result from what is `expected`, and whether `soak` more runs gave the same bits.

    Where bits must agree, the distance is the share of elements that differ.
    """
    inputs, contestant = entry.sets[0], entry.contestant
    if contestant.library == "torch":
        return distance(peers_torch.to_jax(entry.program(*inputs)), expected), True
    poison(jax.eval_shape(contestant.run, *inputs))
    result = entry.program(*inputs)
    error = distance(result, expected) if contestant.bound else float(differing(result, expected))
    return error, all(not float(differing(result, entry.program(*inputs))) for _ in range(soak))


@jax.jit
def differing(one, other) -> jax.Array:
    """The largest share of elements whose bits differ, over the arrays of two trees; any NaN is like any other."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jnp.max(jnp.stack([jnp.mean(_bits(x) != _bits(y), dtype=jnp.float32) for x, y in pairs]))


def _bits(x: jax.Array) -> jax.Array:
    """As integers, one number for every NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    if jnp.issubdtype(x.dtype, jnp.integer):
        return bits
    return jnp.where(jnp.isnan(x.astype(jnp.float32)), jnp.array(jnp.iinfo(bits.dtype).max, bits.dtype), bits)


def reference(contestant: Contestant, inputs: Sequence):
    """What is expected of it, in float32 products that are float32.

    Without leave for more precision than is written: XLA would drop the rounding of an intermediate to bfloat16, and
    then the scales of its tiles are others.
    """
    if contestant.library == "torch":
        inputs = peers_torch.to_jax(inputs)
    here = jax.devices()[0]
    inputs = jax.device_put(inputs, here if contestant.bound else jax.devices("cpu")[0])
    with jax.default_matmul_precision("highest"):
        program = jax.jit(contestant.expected).lower(*inputs).compile({"xla_allow_excess_precision": False})
    return jax.device_put(program(*inputs), here)


def draw(case: Case, prepare: Callable) -> list:
    """As many sets of inputs as the cache cannot hold."""
    prepare = jax.jit(prepare)
    first = prepare(*case.inputs(0))
    return [first, *(prepare(*case.inputs(seed)) for seed in range(1, copies_needed(first)))]


def enter(case: Case, name: str, sets: list) -> Entry:
    """Compile, or hand over to torch."""
    contestant = case.contestants[name]
    if contestant.library == "torch":
        return Entry(contestant.run, [peers_torch.to_torch(inputs) for inputs in sets], contestant)
    return Entry(compiled(contestant.run, f"{case.group} {case.name} {name}", sets[0]), sets, contestant)


def temporary_bytes(entry: Entry) -> int | None:
    """Memory beside inputs and outputs, as compiled."""
    if entry.contestant.library == "torch":
        return None
    memory = entry.program.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def traced(case: Case, programs: dict) -> dict[str, float]:
    """`device_seconds`, or nothing, with a warning, where the trace does not have them."""
    try:
        return device_seconds(programs) if programs else {}
    except AssertionError as error:
        logging.warning("%s, %s: %s; figures are of whole calls", case.group, case.name, error)
        return {}


def figures(case: Case, entry: Entry, floor: float, call: float, device: float | None) -> dict:
    """Of one contestant; rates and shares from the time of its kernels where a trace has it."""
    took = device or call
    return {"us": 1e6 * call, "device_us": None if device is None else 1e6 * device,
            "tflops": 1e-12 * case.flops / took, "gb_per_s": 1e-9 * case.bytes / took, "floor_share": floor / took,
            "temporary_bytes": temporary_bytes(entry)}


def measure(case: Case, copy_rate: float, peers: bool, soak: int) -> dict:
    """A row of the table. A contestant that fails says so in `errors`, and the others go on."""
    entries, checks, errors, drawn, expected = {}, {}, {}, {}, {}
    for name, contestant in case.contestants.items():
        if contestant.library == "torch" and not peers:
            continue
        try:
            if contestant.prepare not in drawn:  # those who take the same inputs share them
                drawn[contestant.prepare] = draw(case, contestant.prepare)
            entry = enter(case, name, drawn[contestant.prepare])
            wanted = contestant.prepare, contestant.expected, contestant.library
            if wanted not in expected:  # of the first: where bits must agree it is ours, and others are near
                expected = {wanted: reference(contestant, entry.sets[0])}
            checks[name] = check(entry, expected[wanted], soak)
            entries[name] = entry
        except Exception as error:  # of any library: one that refuses a shape is a result too
            errors[name] = f"{type(error).__name__}: {str(error).strip().partition('\n')[0][:300]}"
    expected.clear()
    ours = {name: (entry.program, entry.sets) for name, entry in entries.items() if entry.contestant.library == "jax"}
    calls = seconds({name: (jax_batch if name in ours else peers_torch.batch)(entry.program, entry.sets)
                     for name, entry in entries.items()}) if entries else {}
    device = traced(case, ours)
    floor = max(case.flops / case.peak, case.bytes / copy_rate)
    rows = {name: figures(case, entry, floor, calls[name], device.get(name)) for name, entry in entries.items()}
    for name, (error, repeats) in checks.items():
        rows[name] |= {"distance": error, "within": bool(error <= case.contestants[name].bound), "repeats": repeats}
    first = rows.get(next(iter(case.contestants)))
    for row in rows.values():
        row["first_is_times_as_fast"] = first and first["floor_share"] / row["floor_share"]
    return {"group": case.group, "case": case.name, "flops": case.flops, "bytes": case.bytes,
            "floor_us": 1e6 * floor, "first": next(iter(case.contestants)), "like": case.like, "n_rows": case.n_rows,
            "rows": rows, "errors": errors}


def ceilings() -> dict[str, float]:
    """What a large copy (bytes read and written) and a large bfloat16 product reach on this device."""
    large = 2 ** (14 if jax.devices()[0].platform == "gpu" else 10)
    big, a = normal(1, large, large, dtype=jnp.float32), normal(0, large // 2, large // 2)
    copy, product = compiled(lambda x: x + 1, "copy", (big,)), compiled(lambda a: a @ a, "product", (a,))
    took = seconds({"copy": jax_batch(copy, [(big,)]), "product": jax_batch(product, [(a,)])})
    return {"copy_gb_per_s": 2e-9 * n_bytes(big) / took["copy"],
            "bf16_tflops": 2e-12 * (large // 2) ** 3 / took["product"]}


def show(row: dict, rate: str) -> None:
    """One case, a line a contestant; `rate` is `tflops` or `gb_per_s`."""
    print(f"{row['group']}, {row['case']}: floor {row['floor_us']:.1f} us")
    for name, r in row["rows"].items():
        device = "" if r["device_us"] is None else f" ({r['device_us']:.1f} in kernels)"
        wrong = "" if r["within"] and r["repeats"] else "  WRONG" if r["repeats"] else "  NOT REPEATABLE"
        print(f"    {name:28s} {r['us']:9.1f} us{device} {r[rate]:7.0f} {'TFLOP/s' if rate == 'tflops' else 'GB/s'} "
              f"{r['floor_share']:5.0%} of the floor, first x {r['first_is_times_as_fast'] or 0:.2f}, "
              f"distance {r['distance']:.2g}{wrong}")
    for name, error in row["errors"].items():
        print(f"    {name:28s} {error}", flush=True)


def means(rows: Sequence[dict]) -> list[dict]:
    """How many times as fast the first contestant is as each other: geometric mean and worst case of every group."""
    found = []
    for group in dict.fromkeys(row["group"] for row in rows):
        cases = [row["rows"] for row in rows if row["group"] == group and row["first"] in row["rows"]]
        for name in dict.fromkeys(name for case in cases for name in list(case)[1:]):
            ratios = [case[name]["first_is_times_as_fast"] for case in cases if name in case]
            found.append({"group": group, "first": next(iter(cases[0])), "other": name, "cases": len(ratios),
                          "mean": math.exp(statistics.fmean(map(math.log, ratios))), "worst": min(ratios)})
    return found


def costs(rows: Sequence[dict]) -> list[dict]:
    """How many times as long as evenly the first contestant takes in every group that has a `like`.

    Geometric mean and worst over the cases that ran both ways, with the geometric mean of what `n_rows` grew by.
    """
    took = lambda row: row["rows"][row["first"]]["device_us"] or row["rows"][row["first"]]["us"]
    ran = {(row["group"], row["case"]): row for row in rows if row["first"] in row["rows"]}
    pairs = {}
    for (group, name), row in ran.items():
        if (row["like"], name) in ran:
            pairs.setdefault((group, row["like"], row["first"]), []).append((row, ran[row["like"], name]))
    found = []
    for (group, like, first), some in pairs.items():
        times, lengths = ([of(row) / of(even) for row, even in some] for of in (took, lambda row: row["n_rows"]))
        found.append({"group": group, "like": like, "first": first, "cases": len(some), "worst": max(times),
                      "mean": statistics.geometric_mean(times), "n_rows": statistics.geometric_mean(lengths)})
    return found


def define_flags() -> None:
    """Of all commands that print a table."""
    flags.DEFINE_bool("peers", False, "also run torch's form of the same, where torch is installed")
    flags.DEFINE_string("only", "", "nothing but what has this in its name: a case, or a shape to tune")
    flags.DEFINE_integer("soak", 20, "runs of each kernel that must give the same bits", lower_bound=1)


def run(kind: str, cases: Sequence[Case], rate: str, overrides: Sequence[str]) -> None:
    """The whole command: measure, print, write; fails in the end if any of ours was wrong."""
    require(not overrides, f"`benchmark {kind}` has fixed shapes; --config fields belong to `step` and `slice`")
    device = jax.devices()[0]
    require(is_hopper(device), f"`benchmark {kind}` needs a Hopper GPU; the default device is {device.device_kind}")
    titles = [f"{case.group}, {case.name}" for case in cases]
    chosen = [case for case, title in zip(cases, titles, strict=True) if flags.FLAGS.only in title]
    require(chosen, f"--only={flags.FLAGS.only} is in none of: {'; '.join(titles)}")
    table(kind, chosen, rate, flags.FLAGS.peers and peers_torch.available(), flags.FLAGS.soak)


def bad(case: Case, row: dict) -> list[str]:
    """Contestants whose result was wrong, or not repeatable though it should be, and those of JAX that did not run."""
    wrong = [name for name, r in row["rows"].items()
             if not r["within"] or (case.contestants[name].repeats and not r["repeats"])]
    return wrong + [name for name in row["errors"] if case.contestants[name].library == "jax"]


def table(kind: str, cases: Sequence[Case], rate: str, peers: bool, soak: int) -> None:
    start, tops, rows = time.perf_counter(), ceilings(), []
    print(f"{jax.devices()[0].device_kind}: copy {tops['copy_gb_per_s']:.0f} GB/s, bfloat16 product "
          f"{tops['bf16_tflops']:.0f} TFLOP/s\n")
    for case in cases:
        rows.append(measure(case, 1e9 * tops["copy_gb_per_s"], peers, soak))
        show(rows[-1], rate)
        write_json(record("table", {
            "table": kind, "rate": rate, "ceilings": tops, "cases": rows, "means": means(rows),
            "costs": costs(rows)}))
    for m in means(rows):
        print(f"{m['group']}: {m['first']} is {m['mean']:.2f} times as fast as {m['other']} (geometric mean of "
              f"{m['cases']}, worst {m['worst']:.2f})")
    for c in costs(rows):
        print(f"{c['group']}: {c['first']} takes {c['mean']:.2f} times as long as {c['like']} (geometric mean of "
              f"{c['cases']}, worst {c['worst']:.2f}), over {c['n_rows']:.2f} times the rows")
    print(f"took {time.perf_counter() - start:.0f} s")
    wrong = [f"{case.group}, {case.name}: {name}"
             for case, row in zip(cases, rows, strict=True) for name in bad(case, row)]
    require(not wrong, f"wrong or missing results: {'; '.join(wrong)}")
