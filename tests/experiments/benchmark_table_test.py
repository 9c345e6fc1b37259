"""The runner of kernel tables: what is wrong is found, what is refused is named, and ratios compare with the first."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted, interpreter

from dsv3.config import UserError
from experiments import benchmark_grouped, benchmark_table, peers_torch
from experiments.benchmark_attention import FORMS as ATTENTION
from experiments.benchmark_attention import cases_of as attention_cases
from experiments.benchmark_attention import contestant, few_heads_at_once, inputs_of
from experiments.benchmark_clock import CACHE_BYTES, compiled, copies_needed, device_seconds, n_bytes, seconds
from experiments.benchmark_gemm import case as gemm_case
from experiments.benchmark_gemm import decode, to_blocks, to_tiles, whole_fours
from experiments.benchmark_grouped import by_groups, ends, group_sizes, real_rows, weights_by_groups
from experiments.benchmark_loss import case as loss_case
from experiments.benchmark_record import command
from experiments.benchmark_rows import FORMS, SHAPES
from experiments.benchmark_rows import case as rows_case
from experiments.benchmark_rows import dispatch_cases
from experiments.benchmark_table import Case, Contestant, bad, costs, distance, means, measure, show

COPY_RATE = 1e10


def toy(**contestants):
    inputs = lambda seed: (jax.random.normal(jax.random.key(seed), (64, 64)),)
    return Case("group", "toy", inputs, contestants, 64 ** 2, 8 * 64 ** 2, 1e12)


def slow(x):
    for _ in range(60):
        x = jax.lax.optimization_barrier(x @ jnp.eye(64))
    return x + 1


good = Contestant(lambda x: x + 1, lambda x: x + 1.0)


def test_a_row_has_the_time_the_share_of_the_floor_and_the_ratio_to_the_first():
    case = toy(ours=Contestant(slow, good.expected), other=good)
    row = measure(case, COPY_RATE, False, soak=2)
    ours, other = row["rows"]["ours"], row["rows"]["other"]
    assert bad(case, row) == [] and row["errors"] == {}
    assert row["floor_us"] == pytest.approx(1e6 * 8 * 64 ** 2 / COPY_RATE)
    assert ours["floor_share"] == pytest.approx(row["floor_us"] / ours["device_us"])
    assert ours["first_is_times_as_fast"] == 1 and other["first_is_times_as_fast"] < 0.5
    assert 0 < other["device_us"] < ours["device_us"] and ours["device_us"] < 20 * ours["us"]


def test_means_are_geometric_within_a_group_and_name_the_worst():
    row = lambda group, **ratios: {"group": group, "first": "ours", "rows": {
        name: {"first_is_times_as_fast": ratio} for name, ratio in ({"ours": 1.0} | ratios).items()}}
    rows = [row("a", peer=2.0, other=1.5), row("a", peer=0.5), row("b", peer=3.0),
            {"group": "b", "first": "ours", "rows": {}}]
    assert [(m["group"], m["other"], m["cases"], round(m["mean"], 9), m["worst"]) for m in means(rows)] == [
        ("a", "peer", 2, 1.0, 0.5), ("a", "other", 1, 1.5, 1.5), ("b", "peer", 1, 3.0, 3.0)]


def test_costs_are_times_over_those_of_the_even_case_of_the_same_name():
    row = lambda group, case, like, us, n_rows, **others: {
        "group": group, "case": case, "like": like, "first": "ours", "n_rows": n_rows,
        "rows": {"ours": {"us": us, "device_us": None} | others, "peer": {"us": 1.0, "device_us": None}}}
    even = [row("even", "a", None, 900.0, 128, device_us=10.0), row("even", "b", None, 10.0, 256)]
    uneven = [row("skewed", "a", "even", 20.0, 128), row("skewed", "b", "even", 80.0, 1024),
              row("skewed", "not even", "even", 1.0, 1), row("alone", "a", "absent", 1.0, 1)]
    missing = {**row("empty", "a", "even", 1.0, 1), "rows": {}}
    found, = costs([*uneven, missing, *even])  # whichever comes first
    assert found == {"group": "skewed", "like": "even", "first": "ours", "cases": 2, "worst": 8.0,
                     "mean": pytest.approx(4.0), "n_rows": pytest.approx(2.0)}


def test_the_summary_says_who_is_faster_and_what_skew_costs(monkeypatch, capsys):
    """Ours above 1 where it is the faster one, and longer where it has more to do."""
    written = []
    monkeypatch.setattr(benchmark_table, "write_json", written.append)
    monkeypatch.setattr(benchmark_table, "ceilings", lambda: {"copy_gb_per_s": 10.0, "bf16_tflops": 1.0})
    even = toy(ours=good, peer=Contestant(slow, good.expected))._replace(group="even", n_rows=100)
    skewed = toy(ours=Contestant(slow, good.expected), peer=good)._replace(group="skewed", n_rows=300, like="even")
    benchmark_table.table("toy", [skewed, even], "tflops", False, 0)
    one = {m["group"]: m["mean"] for m in written[-1]["means"]}
    assert one["even"] > 2 and one["skewed"] < 0.5
    cost, = written[-1]["costs"]
    assert cost["mean"] == pytest.approx(cost["worst"]) and cost["mean"] > 2 and cost["n_rows"] == pytest.approx(3)
    *_, first, second, third, _ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"skewed: ours is {one['skewed']:.2f} times as fast as peer")
    assert second.startswith(f"even: ours is {one['even']:.2f} times as fast as peer")
    assert third == (f"skewed: ours takes {cost['mean']:.2f} times as long as even (geometric mean of 1, worst "
                     f"{cost['mean']:.2f}), over 3.00 times the rows")


@pytest.mark.parametrize("fault", [
    lambda x: (x + 1).at[3, 5].set(jnp.nan),  # a hole where poisoned memory shines through
    lambda x: x + 1.05,
    lambda x: jnp.zeros_like(x),
])
def test_a_wrong_result_is_named(fault):
    case = toy(ours=good, other=Contestant(fault, good.expected))
    assert bad(case, measure(case, COPY_RATE, False, soak=0)) == ["other"]


def test_a_result_that_changes_is_named(capsys):
    state = itertools.count()
    changing = lambda x: x + 1 + jax.pure_callback(
        lambda: np.float32(1e-6 * next(state)), jax.ShapeDtypeStruct((), jnp.float32))
    case = toy(ours=Contestant(changing, good.expected))
    row = measure(case, COPY_RATE, False, soak=2)
    assert row["rows"]["ours"]["within"] and bad(case, row) == ["ours"]
    beside = toy(ours=good, other=Contestant(changing, good.expected))
    assert bad(beside, measure(beside, COPY_RATE, False, soak=2)) == ["other"]
    beside = toy(ours=good, cuDNN=Contestant(changing, good.expected, repeats=False))  # named in its row only
    row = measure(beside, COPY_RATE, False, soak=2)
    assert bad(beside, row) == [] and not row["rows"]["cuDNN"]["repeats"]
    show(row, "tflops")
    assert "NOT REPEATABLE" in capsys.readouterr().out


def test_one_that_cannot_run_is_named_and_the_others_go_on():
    def refuse(x):
        raise NotImplementedError("no such shape\nand a long story")

    case = toy(ours=Contestant(refuse, good.expected), other=good)
    row = measure(case, COPY_RATE, False, soak=0)
    assert row["errors"] == {"ours": "NotImplementedError: no such shape"} and bad(case, row) == ["ours"]
    assert row["rows"]["other"]["first_is_times_as_fast"] is None and means([row]) == []


def test_the_command_fails_in_the_end_if_anything_was_wrong(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_table, "write_json", lambda record: None)
    case = toy(ours=Contestant(lambda x: x, good.expected))
    with pytest.raises(UserError, match="wrong or missing results: group, toy: ours"):
        benchmark_table.table("toy", [case], "tflops", False, 0)
    assert "WRONG" in capsys.readouterr().out


def test_distance_is_the_largest_of_a_tree_and_sees_what_comparison_hides():
    one = jnp.ones((4,))
    assert distance((one, 3 * one), (one, 2 * one)) == pytest.approx(0.5)
    assert distance(0 * one, 0 * one) == 0 and distance(one, 0 * one) == math.inf
    assert math.isnan(distance((one, one.at[0].set(jnp.nan)), (one, one)))
    assert math.isnan(distance((one.at[0].set(jnp.nan), one), (one, one)))


def test_calls_take_turns_over_more_than_the_cache():
    for size in (1000, 2 ** 20, CACHE_BYTES // 4, CACHE_BYTES, 3 * CACHE_BYTES):
        array = jax.ShapeDtypeStruct((size,), jnp.int8)
        assert copies_needed(array) == 8 or copies_needed(array) * n_bytes(array) > CACHE_BYTES
    assert copies_needed(jax.ShapeDtypeStruct((3 * CACHE_BYTES,), jnp.int8)) == 1


def test_seconds_are_medians_of_rounds_in_turn():
    """A slow batch is slower by its factor; one bad round of five changes nothing."""
    rounds, order = {"a": 0, "b": 0}, []

    def fake(name, per_call):
        def batch(calls):
            rounds[name] += 1
            order.append(name)
            return calls * per_call * (100 if rounds[name] == 5 else 1)

        return batch

    assert seconds({"a": fake("a", 1e-3), "b": fake("b", 3e-3)}) == pytest.approx({"a": 1e-3, "b": 3e-3})
    assert "".join(order[-10:]) == "ab" * 5


def test_device_seconds_tell_programs_apart():
    x = jax.random.normal(jax.random.key(0), (64, 64))
    programs = {name: (compiled(run, f"{name}, (odd) name", (x,)), [(x,)])
                for name, run in {"fast": lambda x: x @ x, "slow": slow}.items()}
    took = device_seconds(programs)
    assert 0 < took["fast"] < 0.2 * took["slow"] < 0.1


@pytest.mark.parametrize("cases", [
    lambda: [gemm_case("forward", 64, 212, 384, by_weights=False), gemm_case("w", 256, 212, 384, by_weights=True)],
    lambda: [rows_case("rows", (200, 256)), *dispatch_cases("toy", 64, 32, 4)],
    lambda: [loss_case(64, 32, 500, (16, 64))],
], ids=["gemm", "quantize", "loss"])
def test_every_contestant_that_runs_here_is_right(cases):
    for case in cases():
        here = {name: one for name, one in case.contestants.items() if name != "Hopper"}
        row = measure(case._replace(contestants=here), COPY_RATE, False, soak=1)
        assert row["rows"] and bad(case, row) == [] and row["errors"] == {}


TOY = {"weights": (1, 128, 256), "permute": (64, 256, 2, 2), "combine": (8, 256, 2, 2), "norm": (128, 512),
       "combine without weights": (8, 256, 2, 2), "norm, both": (128, 512)}


@pytest.mark.parametrize("name", [
    name if name == "both" else pytest.param(name, marks=pytest.mark.slow) for name in FORMS])
def test_every_hopper_form_is_right_interpreted(name, monkeypatch):
    """Through the table's own check; without the clock, which would run an interpreter hundreds of times."""
    for clock in ("seconds", "device_seconds"):
        monkeypatch.setattr(benchmark_table, clock, lambda programs: dict.fromkeys(programs, 1.0))
    case = rows_case(name, TOY.get(name, (128, 256)))
    with interpreter():
        row = measure(case, COPY_RATE, False, soak=1)
    assert bad(case, row) == [] and row["errors"] == {} and "Hopper" in row["rows"]
    assert set(SHAPES) == set(FORMS)


def test_where_bits_must_agree_a_neighbouring_code_is_wrong_and_a_nan_is_like_another():
    other_nan = jax.lax.bitcast_convert_type(jnp.int32(0x7FC00001), jnp.float32)
    exact = Contestant(lambda x: (x + 1).at[0].set(other_nan), lambda x: (x + 1).at[0].set(jnp.nan), bound=0)
    above = Contestant(lambda x: exact.run(x).at[5, 5].set(jnp.nextafter(x[5, 5] + 1, 9)), exact.expected, bound=0)
    case = toy(ours=exact, other=above)
    row = measure(case, COPY_RATE, False, soak=1)
    assert bad(case, row) == ["other"] and row["rows"]["ours"]["distance"] == 0
    assert row["rows"]["other"]["distance"] == pytest.approx(1 / 64 ** 2)


def test_a_reference_keeps_the_roundings_that_are_written():
    """XLA may drop a rounding to bfloat16 that is followed by float32; then amax, and so a scale, would differ."""
    double = lambda x: (x * 1.001).astype(jnp.bfloat16).astype(jnp.float32)
    x = jax.random.normal(jax.random.key(0), (64, 64))
    for bound in (0, 0.01):
        found = benchmark_table.reference(Contestant(double, double, bound=bound), (x,))
        rounded = np.asarray(x * np.float32(1.001)).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found, rounded)


@pytest.mark.parametrize("segments", [False, True])
def test_the_attention_reference_agrees_with_all_heads_at_once(segments):
    """`few_heads_at_once`, where heads are several groups, through the same contestant that cuDNN takes."""
    from dsv3.kernels import attention

    inputs = inputs_of(0, 1, 32, 8, segments)
    assert len(jnp.unique(inputs[-1])) > 1 or not segments
    both = contestant(lambda: attention.ATTENTION, True, segments)
    assert distance(both.run(*inputs), both.expected(*inputs)) < 0.01
    assert len(attention_cases("toy", 1, 32, 8)) == 2
    for index in range(4):  # heads and rotation: each reaches the result
        shifted = (*inputs[:index], inputs[index] + 1, *inputs[index + 1:])
        assert distance(both.run(*shifted), both.expected(*inputs)) > 0.1
    assert few_heads_at_once(attention.Heads(*inputs[:3]), inputs[3], None).dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("segments", [False, True])
def test_our_attention_is_right_interpreted(segments):
    """The contestant of `benchmark attention`, both directions, from whole heads and the rotation."""
    own = contestant(ATTENTION["Hopper"], True, segments)
    inputs = inputs_of(0, 1, 136, 2, segments)
    with interpreted():
        found = jax.block_until_ready(own.run(*inputs))
    assert distance(found, own.expected(*inputs)) < own.bound


@pytest.mark.parametrize("load", ["even", "skewed", "empty"])
def test_group_sizes(load):
    sizes = group_sizes(load, 8, 4096)
    assert sizes.sum() == 4096 and sizes.dtype == np.int32
    assert (load == "even") == (sizes.max() == 512 == sizes.min())
    assert load != "skewed" or 1.25 < sizes.max() / sizes.mean() < 1.35
    assert load != "empty" or (sizes == 0).sum() == 3


def test_the_grouped_command_has_every_number_of_groups_under_every_load():
    cases = benchmark_grouped.cases()
    titles = [(case.group, case.name) for case in cases]
    assert len(set(titles)) == len(titles) <= 50  # some 1.5 s each
    shapes = {experts: [name for name, shape in benchmark_grouped.EXPERTS.items() if shape[0] == experts]
              for experts in (4, 8, 32, 256)}
    assert [benchmark_grouped.EXPERTS[names[0]][1] // experts for experts, names in shapes.items()] == [
        8192, 4096, 256, 128]
    for way in ("forward", "by rows", "by weights"):
        for names in shapes.values():
            assert all((f"{way}, even", name) in titles for name in names)
            for load in ("skewed", "empty"):
                assert any((f"{way}, {load}", name) in titles for name in names)
    rows = {(case.group, case.name): case.n_rows for case in cases}
    for case in cases:
        assert case.like is None or (case.like, case.name) in titles
        assert ("even" in case.group or case.group == "check") == (case.like is None)
    assert rows["forward, skewed", "8 x 4096, gate_up"] == rows["by weights, skewed", "8 x 4096, gate_up"] == sum(
        -(-int(size) // 128) * 128 for size in group_sizes("skewed", 8, 32_768)) > 32_768


@pytest.mark.parametrize("cases", [
    lambda: [gemm_case("forward", 256, 384, 128, by_weights=False), gemm_case("w", 128, 384, 256, by_weights=True)],
    lambda: [case for load in ("even", "skewed") for case in benchmark_grouped.cases_of("toy", load, 2, 256, 128, 384)],
], ids=["gemm", "grouped"])
def test_the_bar_of_weight_gradients_is_the_forward_product_of_the_same_shape(cases):
    """256 tokens, 128 in, 384 out: cuBLASLt multiplies the same tokens and matrix, as often, as it does forward."""
    for case in cases():
        by_weights = case.group.startswith(("w", "by weights"))
        name = "cuBLASLt, forward of that shape" if by_weights else "cuBLASLt, block-scaled"
        dense = [bar for title, bar in case.contestants.items() if title.startswith(name)]
        assert len(dense) == 1 and dense[0].library == "torch" and dense[0].run is peers_torch.scaled_dot
        inputs = case.inputs(0)
        a, b = dense[0].prepare(*inputs)
        assert a.scales.shape == (a.values.shape[1] // 128, 256)  # tiles of 1 x 128, blocks of 128 x 128 in fours
        assert b.scales.shape == (b.values.shape[0] // 128, 4)
        (m, k), n = a.values.shape, b.values.shape[0]
        assert 2 * m * n * k == case.flops == 2 * 256 * 384 * 128
        assert (k, n) == ((384, 128) if case.group.startswith("by rows") else (128, 384))
        if by_weights:
            rows = inputs[0][:256] if len(inputs) == 4 else inputs[0].T
            assert distance(dense[0].expected(a, b), rows.astype(jnp.float32) @ inputs[-1].T) < 0.05


def test_grouped_references_against_a_loop():
    sizes = jnp.array([130, 0, 5, 128], jnp.int32)
    rows = real_rows(jax.random.normal(jax.random.key(0), (640, 16)), sizes)
    d_out = real_rows(jax.random.normal(jax.random.key(1), (640, 24)), sizes)
    w = jax.random.normal(jax.random.key(2), (4, 16, 24))
    starts = [0, 256, 256, 384]
    assert ends(sizes).tolist() == [256, 256, 384, 512]
    out, d_w = np.zeros((640, 24)), np.zeros((4, 16, 24))
    for expert, (start, size) in enumerate(zip(starts, sizes.tolist(), strict=True)):
        part = slice(start, start + size)
        out[part] = np.asarray(rows[part], np.float64) @ np.asarray(w[expert])
        d_w[expert] = np.asarray(rows[part], np.float64).T @ np.asarray(d_out[part])
    assert distance(by_groups(rows, w, sizes), jnp.asarray(out)) < 1e-5
    assert distance(weights_by_groups(rows, d_out, sizes), jnp.asarray(d_w)) < 1e-5


@pytest.mark.slow
def test_scaled_kernels_join_the_grouped_tables(monkeypatch):
    """A right one with the documented signature, and one that ignores the expert: the first passes alone."""
    def right(a, b, expert_Z, out_dtype):
        each = jax.vmap(lambda rows, expert: rows @ decode(b)[expert].T)
        out_ZBN = each(decode(a).reshape(-1, 128, a.values.shape[1]), expert_Z)
        return out_ZBN.reshape(len(a.values), -1).astype(out_dtype)

    def by_weights(a, b, start_E, steps_E):
        block_J = jnp.arange(a.values.shape[1]) // 128
        first_E = start_E // 128
        inside_EJ = (block_J[None] >= first_E[:, None]) & (block_J[None] < (first_E + steps_E)[:, None])
        return jnp.einsum("dj,fj,ej->edf", decode(a), decode(b), inside_EJ.astype(jnp.float32))

    monkeypatch.setattr(benchmark_grouped, "SCALED", {
        "right": right, "wrong": lambda a, b, expert_Z, out_dtype: right(a, b, 0 * expert_Z, out_dtype)})
    monkeypatch.setattr(benchmark_grouped, "SCALED_WEIGHTS", {"right": by_weights})
    for case in benchmark_grouped.cases_of("toy", "empty", 3, 300, 128, 256):
        scaled = {name: one for name, one in case.contestants.items() if name in ("right", "wrong")}
        row = measure(case._replace(contestants=scaled), COPY_RATE, False, soak=1)
        assert row["errors"] == {} and bad(case, row) == ["wrong"][:len(scaled) - 1]


def test_operands_are_padded_and_decode_to_what_they_were():
    w = jax.random.normal(jax.random.key(0), (212, 300))
    blocks, tiles = to_blocks(w), to_tiles(w)
    assert blocks.values.shape == (256, 384) and blocks.scales.shape == (2, 3)
    assert tiles.values.shape == (256, 384) and tiles.scales.shape == (3, 256)
    wide = whole_fours(blocks)
    assert wide.scales.shape == (2, 4)
    for operand in (blocks, tiles, wide):
        whole = decode(operand)
        assert distance(whole[:212, :300], w) < 0.04
        assert not jnp.any(whole[212:]) and not jnp.any(whole[:, 300:])


def test_a_command_is_recorded_without_what_is_private():
    line = ["/somewhere/python3", "-m", "experiments.benchmark", "gemm", "--peers", "--json=/tmp/x.json", "--update",
            "--only=a b"]
    assert command(line) == "python -m experiments.benchmark gemm --peers '--only=a b'"
