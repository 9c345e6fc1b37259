"""Bytes per parameter and per activation element: what is kept in which format (report sections 3.3.2 and 3.3.3)."""

from math import prod

from dsv3.config import OptimizerConfig
from dsv3.quant.formats import FORMATS
from dsv3.quant.tiles import ALONG_ROWS, BLOCK

SCALE_BYTES = 4
"""A scale is float32, also where it is a power of two."""

PLAIN_BYTES = {"bfloat16": 2.0, "float32": 4.0}


def element_bytes(name: str, tile: tuple[int, int] | None = None) -> float:
    """Of one element with its share of its tile's scale; bfloat16 and float32 have none. Whole tiles are assumed."""
    if name in PLAIN_BYTES:
        return PLAIN_BYTES[name]
    return FORMATS[name].bytes_of(2) / 2 + (SCALE_BYTES / prod(tile) if tile else 0.0)


def parameter_bytes(optimizer: OptimizerConfig) -> dict[str, float]:
    """Of one parameter, what a run keeps of it: all that a step changes, and its gradient."""
    moment = PLAIN_BYTES[optimizer.moment_dtype]
    return {"master": 4.0, "gradient": 4.0, "first moment": moment, "second moment": moment}


def storage_table(optimizer: OptimizerConfig) -> str:
    """All of it as a Markdown table; activations as they wait in a bfloat16 model by the recipe `fp8`."""
    rows = [(name, "float32" if name in ("master", "gradient") else optimizer.moment_dtype, size)
            for name, size in parameter_bytes(optimizer).items()]
    rows += [
        ("**kept of a parameter**", "", sum(parameter_bytes(optimizer).values())),
        ("working copy", "bfloat16", element_bytes("bfloat16")),
        ("working copy, one of two layouts", "E4M3, 128 × 128", element_bytes("e4m3", BLOCK)),
        ("activation, input of a product or of SwiGLU", "E4M3, 1 × 128", element_bytes("e4m3", ALONG_ROWS)),
        ("activation, input of `attn.o`", "E5M6 packed, 1 × 128", element_bytes("e5m6", ALONG_ROWS)),
        ("activation, input of a layer or a norm", "bfloat16", element_bytes("bfloat16")),
        ("activation, scores of the gate", "float32", element_bytes("float32")),
        ("gradient of an activation, in use only", "E4M3 or E5M2, 1 × 128", element_bytes("e5m2", ALONG_ROWS))]
    lines = ["| of one parameter or element | format | bytes |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {fmt} | {size:.6g} |" for name, fmt, size in rows])
