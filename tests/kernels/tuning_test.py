"""The tuning table: an entry for this very device, kernel and shape, the default anywhere else, and nothing unknown."""

from typing import NamedTuple

import pytest

from dsv3.config import UserError
from dsv3.kernels.tuning import key, read, tuned


class Settings(NamedTuple):
    width: int = 128
    stages: int = 4


TABLE = {"H100": {"dot": {"64x128": {"parameters": {"width": 256}, "us": 1.0}}}}


@pytest.mark.parametrize("kind, kernel, shape, expected", [
    ("H100", "dot", (64, 128), Settings(256, 4)),
    ("H200", "dot", (64, 128), Settings()),
    ("H100", "quantize", (64, 128), Settings()),
    ("H100", "dot", (128, 64), Settings()),
    ("H100", "dot", (64,), Settings()),
])
def test_an_entry_counts_for_its_own_device_kernel_and_shape(kind, kernel, shape, expected):
    assert tuned(kind, kernel, shape, Settings(), TABLE) == expected


def test_what_an_entry_leaves_out_is_the_caller_s_default():
    assert tuned("H100", "dot", (64, 128), Settings(64, 7), TABLE) == Settings(256, 7)


def test_an_entry_of_an_older_kernel_is_named():
    table = {"H100": {"dot": {"64x128": {"parameters": {"width": 256, "swizzle": 3}}}}}
    with pytest.raises(UserError, match="dot 64x128 on H100 has swizzle; expected width, stages: run .*benchmark tune"):
        tuned("H100", "dot", (64, 128), Settings(), table)


def test_the_committed_table_can_be_read_and_has_its_evidence():
    for kernels in read().values():
        for shapes in kernels.values():
            for shape, entry in shapes.items():
                assert key(map(int, shape.split("x"))) == shape
                assert entry["parameters"] and entry["us"] > 0 and entry["jax"] and entry["date"]
