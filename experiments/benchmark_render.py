"""The tables of docs/benchmarks.md from docs/benchmarks/*.json: python -m experiments.benchmark render

`<!-- table NAME -->` and `<!-- end -->` stand around what is rendered from docs/benchmarks/NAME.json; everything else
on the page is written by hand.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv3.config import UserError, require

PAGE = Path("docs/benchmarks.md")
MARKED = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def caption(data: dict) -> str:
    """What every figure needs: command, device, versions, date."""
    packages = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    return f"    {data['command']}\n\n{data['device']}, {packages}, {data['date']}.\n\n"


def render_table(data: dict) -> str:
    """Kernels: rate of everybody, the first's share of the floor, and how many times as fast it is as the others."""
    unit = {"tflops": "TFLOP/s", "gb_per_s": "GB/s"}[data["rate"]]
    names = list(dict.fromkeys(name for case in data["cases"] for name in case["rows"]))

    def cell(case: dict, name: str) -> str:
        if name not in case["rows"]:
            return ""
        row = case["rows"][name]
        if name == case["first"]:
            return f"{row[data['rate']]:.0f} ({row['floor_share']:.0%} of the floor)"
        ratio = row["first_is_times_as_fast"]
        return f"{row[data['rate']]:.0f}" + ("" if ratio is None else f" (× {ratio:.2f})")

    def line(case: dict) -> list[str]:
        distances = [row["distance"] for row in case["rows"].values()]
        furthest = math.nan if any(map(math.isnan, distances)) else max(distances)
        beside = [row["temporary_bytes"] or 0 for row in case["rows"].values()][:1]
        memory = [f"{size / 2 ** 30:.2f}" for size in beside] if data["table"] == "loss" else []
        return [f"{case['group']}, {case['case']}", f"{case['floor_us']:.1f}", *(cell(case, name) for name in names),
                f"{furthest:.1g}", *memory]

    header = [unit, "floor, µs", *names, "largest distance", *["beside inputs and outputs, GiB"] * (
        data["table"] == "loss")]
    tops = data["ceilings"]
    text = (f"In the same run: copy {tops['copy_gb_per_s']:.0f} GB/s, bfloat16 product {tops['bf16_tflops']:.0f} "
            "TFLOP/s.\n\n")
    text += markdown(header, [line(case) for case in data["cases"] if case["rows"]])
    if data["means"]:
        text += "\n" + markdown(
            ["", "cases", "geometric mean", "worst"],
            [[f"{m['group']}: {m['first']} over {m['other']}", str(m["cases"]), f"{m['mean']:.2f}", f"{m['worst']:.2f}"]
             for m in data["means"]])
    if data.get("costs"):  # only groups of rows have them
        text += "\n" + markdown(
            ["", "cases", "time, geometric mean", "worst", "rows with padding"],
            [[f"{c['group']}: {c['first']}, over {c['like']}", str(c["cases"]), f"{c['mean']:.2f}", f"{c['worst']:.2f}",
              f"{c['n_rows']:.2f}"] for c in data["costs"]])
    return text


def render_slice(data: dict) -> str:
    """Microseconds per token and layer, and their parts."""
    rows = [
        ["forward and backward", f"{data['gradient_us']:.2f}"], ["optimizer", f"{data['optimizer_us']:.2f}"],
        ["together", f"{data['total_us']:.2f}"], ["floor of forward and backward", f"{data['floor_us']:.2f}"],
        *([f"{kind}", f"{micro:.3f}"] for kind, micro in data["breakdown_us"].items()),
    ]
    peer = data["peer_measured"]
    measured = f"{peer['total_us']:.1f} µs in the same run" if peer else f"{data['peer_us']} µs, not in this run"
    return (
        f"{data['tokens']:,} tokens through {data['layers']} layers in {data['micro_batches']} micro-batch(es), "
        f"recomputation {data['remat']}, fullest expert {data['skew']:.2f} times the mean: "
        f"{data['tokens_per_second']:,.0f} tokens/s with the optimizer; forward and backward {data['tflops']:.0f} "
        f"TFLOP/s, MFU {data['mfu']:.1%}, {data['floor_share']:.0%} of the floor; peak {data['gradient_peak_gib']:.1f} "
        f"GiB, with the optimizer {data['peak_gib']:.1f}. Peer ({data['peer']}): {measured}.\n\n"
        + markdown(["per token and layer", "µs"], rows))


def render_step(data: dict) -> str:
    """One training step, and where its time goes."""
    kinds = data.get("breakdown_seconds", {})
    text = (
        f"{1e3 * data['step_seconds']:.1f} ms ({1e3 * data['fastest_seconds']:.1f} to "
        f"{1e3 * data['slowest_seconds']:.1f}), {data['tokens_per_second']:,.0f} tokens/s, MFU {data['mfu']:.1%}, peak "
        f"{data['peak_gib']:.1f} GiB, compiled in {data['compile_seconds']:.1f} s.\n")
    if kinds:  # with --profile
        text += "\n" + markdown(["kind", "ms"], [[kind, f"{1e3 * seconds:.1f}"] for kind, seconds in kinds.items()])
    return text


def render_shapes(data: dict) -> str:
    """Small fixed shapes, where what counts is that they do not grow."""
    return markdown(["layers, MTP", "step, ms", "compile, s", "program lines"], [
        [f"{row['layers']}, {row['mtp']}", f"{1e3 * row['step_seconds']:.1f}", f"{row['compile_seconds']:.1f}",
         f"{row['program_lines']:,}"] for row in data["rows"]])


RENDERERS: dict[str, Callable[[dict], str]] = {
    "table": render_table, "slice": render_slice, "step": render_step, "shapes": render_shapes}


def render(name: str, data: dict) -> str:
    """What stands between the markers of `name`."""
    require(data.get("kind") in RENDERERS, f"docs/benchmarks/{name}.json has kind {data.get('kind')!r}; expected one "
            f"of {', '.join(RENDERERS)}")
    return caption(data) + RENDERERS[data["kind"]](data)


def rendered_file(path: Path) -> str:
    """What stands between the markers of a file's name; `UserError` where it is no measurement."""
    wrong = lambda reason: UserError(
        f"{path} is no whole measurement ({reason}); measure again with --json={path}, or check the file out again")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:  # of JSON, and of bytes that are no text
        raise wrong(error) from error
    if not isinstance(data, dict):
        raise wrong(f"a {type(data).__name__} where an object belongs")
    try:
        return render(path.stem, data)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise wrong(f"{type(error).__name__}: {error}") from error


def rendered(page: str, directory: Path) -> str:
    """`page` with every table made anew from the JSON files in `directory`.

    Raises `UserError` for a marker without a file, a file without a marker, and a broken file.
    """
    names = [match["name"] for match in MARKED.finditer(page)]
    files = {path.stem: path for path in sorted(directory.glob("*.json"))}
    for name in names:
        require(name in files, f"{directory}/{name}.json is missing; measure again, or take its markers off the page")
    for name in files:
        require(name in names, f"nothing on the page is of {files[name]}; add <!-- table {name} --> and <!-- end -->")
    replace = lambda match: match[1] + rendered_file(files[match["name"]]) + match[3]
    return MARKED.sub(replace, page)


def main(overrides: Sequence[str]) -> None:
    require(not overrides, "`benchmark render` takes no --config fields")
    PAGE.write_text(rendered(PAGE.read_text(), PAGE.with_suffix("")))
    print(f"{PAGE} is made of {PAGE.with_suffix('')}/*.json")
