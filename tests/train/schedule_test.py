"""Schedules: the report's values at its break points (section 4.2), and properties of any table."""

import dataclasses
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from dsv3.config import Phase, constant
from dsv3.train.schedule import batch_sequences, learning_rate, value
from experiments.launch import load_config

REPORT = load_config(str(Path(__file__).parents[2] / "configs" / "deepseek_v3_671b.py"), []).train
B, T = 10**9, 10**12
STEP = 15360 * 4096
WARM = 10**6  # a step long after the warm-up


def report_rate(tokens):
    """The learning rate after warm-up, as section 4.2 tells it."""
    if tokens < 10 * T:
        return 2.2e-4
    if tokens < 14_300 * B:
        return 2.2e-5 + 0.5 * (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * (tokens / T - 10) / 4.3))
    return 2.2e-5 if tokens < 14_633 * B else 7.3e-6


@pytest.mark.parametrize("tokens, rate", [
    (0, 2.2e-4), (5 * T, 2.2e-4), (10 * T - 1, 2.2e-4), (10 * T, 2.2e-4), (10 * T + 1, 2.2e-4),
    (12_150 * B, 1.21e-4),
    (14_300 * B - 1, 2.2e-5), (14_300 * B, 2.2e-5), (14_300 * B + 1, 2.2e-5),
    (14_633 * B - 1, 2.2e-5), (14_633 * B, 7.3e-6), (14_633 * B + 1, 7.3e-6),
    (14_800 * B, 7.3e-6), (2**60, 7.3e-6),
])
def test_learning_rate_of_the_report(tokens, rate):
    assert learning_rate(REPORT, WARM, tokens) == pytest.approx(rate, rel=1e-12)


@hypothesis.given(st.integers(0, 16 * T))
def test_learning_rate_is_the_formula_everywhere(tokens):
    assert learning_rate(REPORT, WARM, tokens) == pytest.approx(report_rate(tokens), rel=1e-9)


def test_cosine_quarters():
    span = 2.2e-4 - 2.2e-5
    for quarter, share in [(1, (1 + math.sqrt(0.5)) / 2), (2, 0.5), (3, (1 - math.sqrt(0.5)) / 2)]:
        tokens = 10 * T + quarter * 1075 * B
        assert learning_rate(REPORT, WARM, tokens) == pytest.approx(2.2e-5 + share * span, rel=1e-12)


@pytest.mark.parametrize("step, share", [(0, 1 / 2000), (999, 0.5), (1998, 1999 / 2000), (1999, 1), (2000, 1)])
def test_warm_up_is_linear_over_2000_steps(step, share):
    assert learning_rate(REPORT, step, 0) == pytest.approx(2.2e-4 * share, rel=1e-15)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(dataclasses.replace(REPORT, warmup_steps=0), 0, 0) == 2.2e-4


def test_warm_up_scales_whatever_the_schedule_says():
    assert learning_rate(REPORT, 999, 14_633 * B) == pytest.approx(0.5 * 7.3e-6, rel=1e-15)


@pytest.mark.parametrize("tokens, gamma, weight", [
    (0, 0.001, 0.3), (10 * T - 1, 0.001, 0.3), (10 * T, 0.001, 0.1), (10 * T + 1, 0.001, 0.1),
    (14_300 * B - 1, 0.001, 0.1), (14_300 * B, 0.0, 0.1), (14_800 * B, 0.0, 0.1),
])
def test_bias_speed_and_mtp_weight_of_the_report(tokens, gamma, weight):
    assert value(REPORT.bias_update_speed, tokens) == gamma
    assert value(REPORT.mtp_lambda, tokens) == weight


@pytest.mark.parametrize("tokens, sequences", [
    (0, 3072), (469 * B // 2, 9216), (469 * B - 1, 15360 - 768), (469 * B, 15360), (14_800 * B, 15360),
])
def test_batch_ramp_of_the_report(tokens, sequences):
    """Linear over 469B tokens, rounded down to whole increments: the last is reached at the end, not before."""
    assert batch_sequences(REPORT, tokens) == sequences


@hypothesis.given(st.integers(0, 600 * B), st.integers(0, 600 * B))
def test_batches_are_whole_increments_and_never_shrink(a, b):
    small, large = (batch_sequences(REPORT, tokens) for tokens in sorted((a, b)))
    assert isinstance(small, int)
    assert small % REPORT.batch_increment == large % REPORT.batch_increment == 0
    assert 3072 <= small <= large <= 15360


def test_the_report_trains_for_14_8_trillion_tokens():
    """`steps` of the config is the fewest that reach 14.8T; after the ramp a step takes 62,914,560 tokens."""
    tokens, steps = 0, 0
    while tokens < 469 * B:
        tokens += batch_sequences(REPORT, tokens) * REPORT.seq_len
        steps += 1
    assert steps == 15_976
    assert REPORT.steps == steps + math.ceil((14_800 * B - tokens) / STEP)


def test_neighbouring_steps_differ_where_float32_cannot_tell_them_apart():
    """One step is 6e7 tokens. Float32 near 1.2e13 counts in units of 1e6, so it could not tell 1e5 tokens apart."""
    rates = [learning_rate(REPORT, WARM, 12 * T + i * STEP) for i in range(3)]
    assert rates[0] > rates[1] > rates[2]
    assert rates[0] - rates[1] == pytest.approx(rates[1] - rates[2], rel=1e-4)
    assert learning_rate(REPORT, WARM, 12 * T) != learning_rate(REPORT, WARM, 12 * T + 100_000)


@pytest.mark.parametrize("boundary", [10 * T, 14_300 * B])
def test_the_rate_has_no_jump_at_either_end_of_the_cosine(boundary):
    before, after = (learning_rate(REPORT, WARM, tokens) for tokens in (boundary - 1, boundary))
    assert before == pytest.approx(after, rel=1e-12)


values = st.floats(0, 1, allow_subnormal=False)


@st.composite
def tables(draw, shapes=("constant", "linear", "cosine")):
    """Up to four finite phases of any shape, then a constant."""
    ends = sorted(draw(st.sets(st.integers(1, 10**15), max_size=4)))
    phases = []
    for until in ends:
        shape, start = draw(st.sampled_from(shapes)), draw(values)
        end = start if shape == "constant" else draw(values)
        phases.append(Phase(until=until, start=start, end=end, shape=shape))
    return (*phases, *constant(draw(values)))


def phase_at(schedule, tokens):
    return next(phase for phase in schedule if tokens < phase.until)


@hypothesis.given(tables(), st.integers(0, 2 * 10**15))
def test_a_value_lies_between_the_ends_of_its_phase(schedule, tokens):
    phase = phase_at(schedule, tokens)
    low, high = sorted((phase.start, phase.end))
    slack = 1e-15
    assert low - slack <= value(schedule, tokens) <= high + slack


@hypothesis.given(tables())
def test_a_phase_begins_at_its_start_and_approaches_its_end(schedule):
    begin = 0
    for phase in schedule[:-1]:
        assert value(schedule, begin) == phase.start
        last = phase.until * (1 - 1e-12)
        if last > begin and (phase.until - last) / (phase.until - begin) < 1e-9:
            assert value(schedule, last) == pytest.approx(phase.end, abs=1e-8)
        begin = phase.until
    assert value(schedule, begin) == value(schedule, 10 * begin + 1) == schedule[-1].start


@hypothesis.given(st.sampled_from(["linear", "cosine"]), values, values, st.integers(1, 10**13), st.data())
def test_within_a_phase_the_value_is_monotone_and_symmetric(shape, start, end, until, data):
    schedule = (Phase(until=until, start=start, end=end, shape=shape), *constant(end))
    a, b = sorted(data.draw(st.integers(0, until - 1)) for _ in range(2))
    assert (value(schedule, b) - value(schedule, a)) * (end - start) >= -1e-15
    if 0 < a:
        assert value(schedule, a) + value(schedule, until - a) == pytest.approx(start + end, abs=1e-12)


@hypothesis.given(values, values, st.integers(1, 10**13))
def test_shapes_at_a_quarter(start, end, quarter):
    linear, cosine = (
        value((Phase(until=4 * quarter, start=start, end=end, shape=shape), *constant(end)), quarter)
        for shape in ("linear", "cosine"))
    assert linear == pytest.approx(start + (end - start) / 4, abs=1e-12)
    assert cosine == pytest.approx(start + (end - start) * (1 - math.sqrt(0.5)) / 2, abs=1e-12)


def test_tokens_are_python_integers_beyond_double_precision():
    """Neighbours above 2**53 are told apart at a boundary: comparison with `until` is exact, not rounded."""
    edge = 2**60
    schedule = (Phase(until=edge, start=1.0, end=1.0, shape="constant"), *constant(0.0))
    assert value(schedule, edge - 1) == 1.0
    assert value(schedule, edge) == 0.0
