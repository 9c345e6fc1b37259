"""The tuning table: an entry for this very device, kernel and shape, the default anywhere else, and nothing unknown."""

import copy
import json
from typing import NamedTuple

import pytest

from dsv3.config import UserError
from dsv3.kernels import attention_backward_hopper, attention_hopper, scaled_products_hopper
from dsv3.kernels.fp8_hopper import FAST
from dsv3.kernels.scaled_warpgroups_hopper import Tuning
from dsv3.kernels.stream_hopper import Streaming
from dsv3.kernels.tuning import key, read, tuned


class Settings(NamedTuple):
    width: int = 128
    stages: int = 4


TABLE = {"H100": {"dot": {"64x128": {"parameters": {"width": 256}, "us": 1.0}}}}
TABLE_TEXT = json.dumps(TABLE)


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


@pytest.mark.parametrize("value", ["256", 256.0, True, None])
def test_a_parameter_of_another_type_is_named(value):
    table = {"H100": {"dot": {"64x128": {"parameters": {"width": value}}}}}
    with pytest.raises(UserError, match=f"dot 64x128 on H100 has width {value!r}; expected int: run .*benchmark tune"):
        tuned("H100", "dot", (64, 128), Settings(), table)


@pytest.mark.parametrize("name, value, least", [
    ("stages", 0, 1), ("blocks", -1, 1), ("behind", -1, 0), ("behind", 0, 0), ("behind", 1, 0)])
def test_a_number_of_nothing_is_named(name, value, least):
    table, default = {"H100": {"rows": {"128x128": {"parameters": {name: value}}}}}, Streaming(2, 1, 1)
    if value >= least:
        assert tuned("H100", "rows", (128, 128), default, table) == default._replace(**{name: value})
    else:
        with pytest.raises(UserError, match=f"rows 128x128 on H100 has {name} {value}; expected at least {least}: run"):
            tuned("H100", "rows", (128, 128), default, table)


@pytest.mark.parametrize("value, accepted", [("a", True), (None, True), (1, False)])
def test_a_parameter_of_several_types_may_have_any_of_them(value, accepted):
    table = {"H100": {"dot": {"64x128": {"parameters": {"pair": value}}}}}
    if accepted:
        assert tuned("H100", "dot", (64, 128), Tuning(), table) == Tuning(pair=value)
    else:
        with pytest.raises(UserError, match="has pair 1; expected str or NoneType"):
            tuned("H100", "dot", (64, 128), Tuning(), table)


@pytest.mark.parametrize("text, wanted", [
    ("", "cannot be read .*line 1"), (TABLE_TEXT[:30], "cannot be read"), ("\udcff", "cannot be read"),
    ("[]", "the whole of it is list"), ('{"H100": 3}', "H100 is int"), ('{"H100": {"dot": []}}', "H100 dot is list"),
    ('{"H100": {"dot": {"1": null}}}', "H100 dot 1 is NoneType"),
    ('{"H100": {"dot": {"1": {}}}}', "H100 dot 1 has no parameters"),
    ('{"H100": {"dot": {"1": {"parameters": [1]}}}}', "H100 dot 1 has no parameters")])
def test_a_damaged_table_is_named_with_what_to_do(tmp_path, text, wanted):
    path = tmp_path / "tuning.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=f"the tuning table {path} .*{wanted}.*: restore it"):
        read(path)


def test_a_table_that_is_not_there_is_named_too(tmp_path):
    with pytest.raises(UserError, match="none.json cannot be read .*: restore it"):
        read(tmp_path / "none.json")


def test_a_whole_table_is_read(tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text(TABLE_TEXT)
    assert read(path) == TABLE


PRODUCTS = [function.__name__ for function in (
    scaled_products_hopper.scaled_dot, scaled_products_hopper.scaled_grouped_dot,
    scaled_products_hopper.scaled_weight_gradient, scaled_products_hopper.scaled_grouped_weight_gradient)]
SETTINGS = {name: fast.default for name, fast in FAST.items()} | dict.fromkeys(PRODUCTS, Tuning()) | {
    "attention_forward": attention_hopper.Settings(), "attention_backward": attention_backward_hopper.Settings()}
"""What every kernel that looks into the table looks up."""


def fed_to_their_kernels(table):
    """Every entry is the whole settings of its own kernel: a default that changes changes no entry."""
    for kind, kernels in table.items():
        for kernel, shapes in kernels.items():
            for shape, entry in shapes.items():
                found = tuned(kind, kernel, tuple(map(int, shape.split("x"))), SETTINGS[kernel], table)
                assert found._asdict() == entry["parameters"]


def test_the_committed_entries_are_those_of_their_kernels():
    fed_to_their_kernels(read())


@pytest.mark.parametrize("kernel", ["norm_quantize", "scaled_dot", "swiglu_quantize"])
def test_a_renamed_parameter_or_kernel_is_found(kernel):
    table = copy.deepcopy(read())
    kernels = next(iter(table.values()))
    parameters = next(iter(kernels[kernel].values()))["parameters"]
    parameters["stagez"] = parameters.pop("stages")
    with pytest.raises(UserError, match="has stagez"):
        fed_to_their_kernels(table)
    kernels["other"] = kernels.pop(kernel)
    with pytest.raises(KeyError, match="other"):
        fed_to_their_kernels(table)


def test_the_committed_table_can_be_read_and_has_its_evidence():
    for kernels in read().values():
        for shapes in kernels.values():
            for shape, entry in shapes.items():
                assert key(map(int, shape.split("x"))) == shape
                assert entry["parameters"] and entry["us"] > 0 and entry["jax"] and entry["date"]
