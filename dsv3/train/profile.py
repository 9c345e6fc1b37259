"""Where the time of a step goes: device events of a profiler trace, summed by kind of operation."""

import re
from collections.abc import Sequence
from pathlib import Path

from jax.profiler import ProfileData

IDLE = "idle"
PRODUCT = r"dot_general|mpmd_map"
RULES = (
    ("attention", r"/attention/.*(dot_product_attention|dot_general|mpmd_map)", r"sdpa|fmha|cudnn::fusion"),
    ("quantisation", r"quanti[sz]e", r"quanti[sz]e"),
    ("grouped products", r"/experts/.*(mpmd_map|dot_general)", r"mosaic_gpu"),
    ("head and loss", r"_head_loss", None),
    ("router, dispatch and combine", r"/(router|dispatch|combine)/", None),
    ("norms and elementwise", r"rms_norm", None),
    ("dense products", PRODUCT, r"nvjet|cutlass|gemm|xmma"),
    ("norms and elementwise", r"Transformer", None),
    ("optimizer", r"", None),
)
"""(kind, pattern of the operation in the program, pattern of the kernel where the operation has no name): the
first that matches."""


def operation_names(program: str) -> dict[str, str]:
    """The name that every instruction of a compiled program (`compiled.as_text()`) had where it was written.

    A fusion that has none, such as a product with the slices it reads and writes, is called by what it holds: its
    product, or the last of its instructions.
    """
    named = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    nameless = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (?!.*op_name=).*calls=%?([\w.\-]+)", re.MULTILINE)
    names = dict(named.findall(program))
    computations = dict(re.findall(r"^%?([\w.\-]+) \(.*?\{$\n(.*?)^\}", program, re.MULTILINE | re.DOTALL))
    for instruction, called in nameless.findall(program):
        inside = [name for _, name in named.findall(computations.get(called, ""))]
        if inside:
            names[instruction] = next((name for name in inside if re.search(PRODUCT, name)), inside[-1])
    return names


def kind_of(kernel: str, operation: str) -> str:
    """One of the kinds in `RULES`, attention split in two: programs put `transpose(` around what is backward."""
    for kind, operation_pattern, kernel_pattern in RULES:
        unnamed = not operation and kernel_pattern and re.search(kernel_pattern, kernel)
        if unnamed or re.search(operation_pattern, operation):
            direction = " backward" if "transpose(" in operation else " forward"
            return kind + direction if kind == "attention" else kind
    raise AssertionError("the last rule matches everything")


def busy_time(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def events_by_program(trace: ProfileData) -> dict[str, list[tuple[str, str, float, float]]]:
    """(kernel, instruction, start, end) in nanoseconds of everything that every program ran, by its module's name."""
    found: dict[str, list] = {}
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_module" in stats:
                    found.setdefault(stats["hlo_module"], []).append(
                        (event.name, str(stats.get("hlo_op", "")), event.start_ns, event.end_ns))
    return found


def program_events(trace: ProfileData, module: str) -> list[tuple[str, str, float, float]]:
    """`events_by_program` of one program."""
    return events_by_program(trace).get(module, [])


def latest_trace(directory: str) -> ProfileData:
    """The last trace written under `directory`."""
    paths = sorted(Path(directory).rglob("*.xplane.pb"))
    assert paths, f"no trace under {directory}"
    return ProfileData.from_file(str(paths[-1]))


def module_name(program: str) -> str:
    """What a trace calls a compiled program (`compiled.as_text()`)."""
    return re.match(r"HloModule ([\w.\-]+)", program)[1]


def busy_seconds(directory: str, modules: Sequence[str]) -> list[float]:
    """Seconds in which anything of each program ran, of the trace under `directory`: no launches, no gaps."""
    events = events_by_program(latest_trace(directory))
    missing = [module for module in modules if module not in events]
    assert not missing, f"no events of {', '.join(missing)} under {directory}"
    return [1e-9 * busy_time([(start, end) for _, _, start, end in events[module]]) for module in modules]


def breakdown(directory: str, program: str, steps: int) -> dict[str, float]:
    """Seconds a step by kind, longest first, from the trace under `directory` of `steps` runs of a compiled program.

    The program must have been compiled without command buffers: inside one, kernels carry no operation's name. `idle`
    is the time from the first event to the last in which nothing ran. Kinds that overlap count in full each.
    """
    module = module_name(program)
    events = program_events(latest_trace(directory), module)
    assert events, f"no events of {module} under {directory}"
    names = operation_names(program)
    totals: dict[str, float] = {}
    for kernel, instruction, start, end in events:
        kind = kind_of(kernel, names.get(instruction, ""))
        totals[kind] = totals.get(kind, 0.0) + (end - start)
    spans = [(start, end) for _, _, start, end in events]
    totals[IDLE] = max(end for _, end in spans) - min(start for start, _ in spans) - busy_time(spans)
    return {kind: 1e-9 * time / steps for kind, time in sorted(totals.items(), key=lambda item: -item[1])}
