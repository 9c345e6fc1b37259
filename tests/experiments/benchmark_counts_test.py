"""Operations and bytes that floors and rates stand on, of one shape a command, written out by hand."""

import pytest

from experiments import benchmark_attention, benchmark_gemm, benchmark_grouped, benchmark_loss
from experiments.benchmark_rows import FORMS
from experiments.benchmark_rows import case as rows_case
from experiments.benchmark_rows import dispatch_cases
from experiments.benchmark_table import BF16_FLOPS, FP8_FLOPS

KIB = 1024


def counts(case):
    return case.flops, case.bytes


def test_gemm():
    """256 x 200 x 300: three tiles of 128 along 300, two blocks along 200. A product is a multiplication and a sum."""
    forward = benchmark_gemm.case("forward", 256, 200, 300, by_weights=False)
    operands = 256 * 300 + 200 * 300
    assert counts(forward) == (30_720_000, operands + 4 * (256 * 3 + 2 * 3) + 2 * 256 * 200)
    by_weights = benchmark_gemm.case("by weights", 256, 200, 300, by_weights=True)
    assert counts(by_weights) == (30_720_000, operands + 4 * (256 * 3 + 200 * 3) + 4 * 256 * 200)
    found = {(case.group, case.name): case for case in benchmark_gemm.cases()}
    by_rows = found["by rows", "4096 x 7168 x 2112"]  # 17 tiles of 2112, 56 blocks of 7168
    assert counts(by_rows) == (
        2 * 62_008_590_336, 4096 * 2112 + 7168 * 2112 + 4 * (4096 * 17 + 56 * 17) + 2 * 4096 * 7168)
    assert found["by weights", "7168 x 2112 x 4096"].flops == by_rows.flops
    assert {case.peak for case in found.values()} == {FP8_FLOPS}


def test_grouped():
    """300 rows in three groups, of which one is empty: 150 rows take two blocks of 128."""
    forward, by_rows, by_weights = benchmark_grouped.cases_of("toy", "empty", 3, 300, 256, 384)
    assert [case.group for case in (forward, by_rows, by_weights)] == [
        "forward, empty", "by rows, empty", "by weights, empty"]
    matrices = 2 * (256 * 384 + 4 * 2 * 3)
    assert counts(forward) == (58_982_400, 300 * 256 + 4 * 300 * 2 + matrices + 2 * 300 * 384)
    assert counts(by_rows) == (58_982_400, 300 * 384 + 4 * 300 * 3 + matrices + 2 * 300 * 256)
    scales = 4 * (2 + 2) * (256 + 384)
    assert counts(by_weights) == (58_982_400, 300 * (256 + 384) + scales + 3 * 4 * 256 * 384)
    full, *_ = benchmark_grouped.cases_of("toy", "even", 3, 300, 256, 384)
    assert counts(full) == (58_982_400, forward.bytes + matrices // 2)


M, K = 256, 512
WIDE, NARROW = 2 * M * K, M * K + 4 * KIB
"""A matrix in bfloat16; one in 8 bits, with a scale of 4 bytes for every 128 elements, whichever way they run."""
HALF = M * K // 2 + 2 * KIB
ROWS = {
    "rows": WIDE + NARROW, "columns": WIDE + NARROW, "both": WIDE + 2 * NARROW,
    "both, special numbers": WIDE + NARROW + (WIDE + 4 * KIB),  # E5M6 is carried in bfloat16
    "requantise": 2 * NARROW, "requantise E5M6": (WIDE + 4 * KIB) + NARROW,
    "pack": WIDE + NARROW + (M * K * 3 // 2 + 4 * KIB), "unpack": (M * K * 3 // 2 + 4 * KIB) + WIDE + NARROW,
    "weights": 4 * M * K + 2 * (M * K + 4 * 2 * 4), "norm alone": WIDE + 4 * K + WIDE, "norm": WIDE + 4 * K + NARROW,
    "norm, both": WIDE + 4 * K + 2 * NARROW, "swiglu": WIDE + HALF + NARROW, "swiglu, gate_up as kept": WIDE + NARROW,
    "swiglu backward": (NARROW + M * K + 4 * M) + (2 * NARROW + HALF + 4 * M),
    # 128 tokens of 2 choices among 4 experts: 256 rows, and room for 127 more of every expert in whole blocks.
    "permute": (128 * K + 4 * 128 * 4) + 4 * 640 + (640 * K + 4 * 640 * 4),
    "combine": 256 * 2 * K + (4 + 4) * 256 + 128 * 2 * K,
    "combine without weights": 256 * 2 * K + 4 * 256 + 128 * 2 * K,
}
SHAPES = {"weights": (2, 256, 256), **dict.fromkeys(("permute", "combine", "combine without weights"), (128, K, 4, 2))}


@pytest.mark.parametrize("name", FORMS)
def test_rows(name):
    case = rows_case(name, SHAPES.get(name, (M, K)))
    assert counts(case) == (0, ROWS[name]) and case.peak == BF16_FLOPS


def test_dispatch_and_combine():
    """128 tokens, 8 choices among 4 experts: 1,024 rows, and 1,408 with room for padding."""
    dispatch, combine = dispatch_cases("toy", 128, 256, 4)
    assert counts(dispatch) == (0, 2 * 128 * 256 + 4 * 1408 + 2 * 1408 * 256)
    assert counts(combine) == (0, 2 * 1024 * 256 + (4 + 4) * 1024 + 2 * 128 * 256)


def test_attention():
    """2 rows of 64 tokens, 3 heads: half of the square, scores over 192, values over 128."""
    forward, both = benchmark_attention.cases_of("toy", 2, 64, 3)
    scores, values = 2 * (2 * 3 * 64 * 64 * 192) // 2, 2 * (2 * 3 * 64 * 64 * 128) // 2
    tokens = 2 * 64
    heads, angles = 2 * tokens * (3 * 192 + 3 * (128 + 128) + 64), 4 * 2 * tokens * 32
    out = 2 * tokens * 3 * 128
    assert counts(forward) == (scores + values, heads + angles + out)
    # d_v and the gradient of the probabilities over 128, d_q and d_k over 192; scores again are not counted
    assert counts(both) == (3 * scores + 3 * values, heads + angles + out + out + heads)
    documents, _ = benchmark_attention.cases_of("toy", 2, 64, 3, segments=True)
    assert counts(documents) == (forward.flops, forward.bytes + 4 * tokens)
    assert {case.peak for case in (forward, both, documents)} == {BF16_FLOPS}


def test_loss():
    """Logits, d_x, d_w; the head and its gradient in float32, tokens and theirs in bfloat16, three numbers a token."""
    case = benchmark_loss.case(64, 32, 500, (16, 64))
    assert counts(case) == (3 * 2 * 64 * 32 * 500, 2 * 4 * 32 * 500 + 2 * 2 * 64 * 32 + 3 * 4 * 64)
    assert case.peak == BF16_FLOPS
