"""docs/benchmarks.md: its tables are what the renderer makes of the committed JSON files, and nothing is left over."""

import json
import math
from pathlib import Path

import pytest

from dsv3.config import UserError
from experiments.benchmark_render import PAGE, RENDERERS, render, rendered

ROOT = Path(__file__).parents[2]
HEAD = {"device": "a GPU", "versions": {"jax": "1.0", "torch": "2.0"}, "date": "2026-11-22", "command": "python -m x"}


def contestant(tflops, ratio, **others):
    return {"tflops": tflops, "gb_per_s": 10 * tflops, "floor_share": tflops / 2000, "distance": 0.002,
            "first_is_times_as_fast": ratio, "temporary_bytes": 2 ** 30, **others}


def table(**others):
    row = lambda name, rows, first="ours": {
        "group": "forward", "case": name, "first": first, "floor_us": 12.34, "rows": rows, "errors": {}}
    cases = [row("1 x 2", {"ours": contestant(1000, 1.0), "peer": contestant(800, 1.25)}),
             row("3 x 4", {"ours": contestant(500, 1.0)}), row("5 x 6", {"peer": contestant(600, None)}),
             row("7 x 8", {})]
    means = [{"group": "forward", "first": "ours", "other": "peer", "cases": 1, "mean": 1.25, "worst": 1.25}]
    return {**HEAD, "kind": "table", "table": "gemm", "rate": "tflops", "cases": cases, "means": means,
            "ceilings": {"copy_gb_per_s": 2900.4, "bf16_tflops": 780.0}, **others}


def test_the_committed_page_is_what_its_files_make():
    page = (ROOT / PAGE).read_text()
    assert rendered(page, (ROOT / PAGE).with_suffix("")) == page


def test_a_table_of_kernels():
    lines = render("gemm", table()).splitlines()
    assert lines[0] == "    python -m x" and lines[2] == "a GPU, jax 1.0, torch 2.0, 2026-11-22."
    assert lines[4] == "In the same run: copy 2900 GB/s, bfloat16 product 780 TFLOP/s."
    assert lines[6:11] == [
        "| TFLOP/s | floor, µs | ours | peer | largest distance |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| forward, 1 x 2 | 12.3 | 1000 (50% of the floor) | 800 (× 1.25) | 0.002 |",
        "| forward, 3 x 4 | 12.3 | 500 (25% of the floor) |  | 0.002 |",
        "| forward, 5 x 6 | 12.3 |  | 600 | 0.002 |",
    ]
    assert lines[-1] == "| forward: ours over peer | 1 | 1.25 | 1.25 |" and "7 x 8" not in "".join(lines)
    assert "| forward, 1 x 2 | 12.3 | 10000 (50% of the floor) |" in render("x", table(rate="gb_per_s"))
    unknown = table()
    unknown["cases"][0]["rows"]["peer"]["distance"] = math.nan  # not hidden behind a number beside it
    assert "| forward, 1 x 2 | 12.3 | 1000 (50% of the floor) | 800 (× 1.25) | nan |" in render("x", unknown)
    assert "| forward, 1 x 2 | 12.3 | 1000 (50% of the floor) | 800 (× 1.25) | 0.002 | 1.00 |" in render(
        "x", table(table="loss"))


def test_a_slice_with_and_without_its_peer_measured():
    data = {**HEAD, "kind": "slice", "tokens": 16_384, "layers": 4, "micro_batches": 1, "remat": "report", "skew": 1.29,
            "gradient_us": 4.0, "optimizer_us": 0.5, "total_us": 4.5, "floor_us": 2.4, "floor_share": 0.6, "mfu": 0.5,
            "tflops": 1000.0, "tokens_per_second": 50_000.0, "gradient_peak_gib": 40.0, "peak_gib": 45.0,
            "peer": "torch", "peer_us": 12.4, "peer_measured": None, "breakdown_us": {"attention forward": 1.5}}
    text = render("slice", data)
    assert "50,000 tokens/s" in text and "| attention forward | 1.500 |" in text
    assert "Peer (torch): 12.4 µs, not in this run." in text
    assert "Peer (torch): 11.0 µs in the same run." in render("slice", data | {"peer_measured": {"total_us": 11.0}})


def page_with(*names):
    return "prose\n" + "".join(f"<!-- table {name} -->\nold\n<!-- end -->\nmore prose\n" for name in names)


def test_prose_stays_and_tables_change_and_a_second_time_nothing_does(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps(table()))
    page = rendered(page_with("one", "two"), tmp_path)
    assert page.startswith("prose\n<!-- table one -->\n    python -m x\n") and page.count("more prose\n") == 2
    assert "old" not in page and rendered(page, tmp_path) == page


def test_markers_and_files_belong_together(tmp_path):
    with pytest.raises(UserError, match="one.json is missing"):
        rendered(page_with("one"), tmp_path)
    (tmp_path / "one.json").write_text(json.dumps(table()))
    with pytest.raises(UserError, match="nothing on the page is of .*one.json"):
        rendered(page_with(), tmp_path)
    (tmp_path / "one.json").write_text(json.dumps(table(kind="tabel")))
    wanted = f"^docs/benchmarks/one.json has kind 'tabel'; expected one of {', '.join(RENDERERS)}"
    with pytest.raises(UserError, match=wanted):
        rendered(page_with("one"), tmp_path)


@pytest.mark.parametrize("content, reason", [
    (json.dumps(table())[:200].encode(), "Unterminated|Expecting"), (b"", "Expecting value"),
    (json.dumps([table()]).encode(), "a list where an object belongs"), (b"\xff\xfe", "decode"),
    (json.dumps({name: value for name, value in table().items() if name != "ceilings"}).encode(), "'ceilings'"),
    (json.dumps(table(versions=[])).encode(), "AttributeError"), (json.dumps(table(cases=None)).encode(), "TypeError"),
    (json.dumps(table()).replace("12.34", '"12.34"').encode(), "ValueError"),
])
def test_a_broken_file_is_named_on_one_line_with_what_to_do(tmp_path, content, reason):
    (tmp_path / "one.json").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        rendered(page_with("one"), tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/one.json is no whole measurement (")
    assert "measure again with --json=" in str(caught.value) and "\n" not in str(caught.value)


def test_the_cost_of_skew_is_a_table_of_its_own():
    cost = {"group": "forward, skewed", "like": "forward, even", "first": "ours", "cases": 3, "mean": 1.0321,
            "worst": 1.1, "n_rows": 1.004}
    assert render("x", table(costs=[cost])).splitlines()[-3:] == [
        "|  | cases | time, geometric mean | worst | rows with padding |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| forward, skewed: ours, over forward, even | 3 | 1.03 | 1.10 | 1.00 |"]
    assert "rows with padding" not in render("x", table(costs=[])) + render("x", table())


def test_a_step_with_and_without_a_profile():
    data = {**HEAD, "kind": "step", "step_seconds": 0.2, "fastest_seconds": 0.1, "slowest_seconds": 0.3,
            "tokens_per_second": 1000.0, "mfu": 0.5, "peak_gib": 3.0, "compile_seconds": 4.0}
    assert render("x", data).endswith("200.0 ms (100.0 to 300.0), 1,000 tokens/s, MFU 50.0%, peak 3.0 GiB, compiled "
                                      "in 4.0 s.\n")
    assert render("x", data | {"breakdown_seconds": {"idle": 0.05}}).endswith(
        "in 4.0 s.\n\n| kind | ms |\n| --- | ---: |\n| idle | 50.0 |\n")
