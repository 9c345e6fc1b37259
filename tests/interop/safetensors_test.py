"""The file format: what is written is read back bit for bit, and nothing but a sound file is read at all."""

import json
import random

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import UserError
from dsv3.interop import safetensors
from dsv3.interop.safetensors import DTYPES, INDEX, File, Reader, write

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
contents = st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
                           st.tuples(st.sampled_from(sorted(DTYPES)), shapes), min_size=1, max_size=8)


def random_bytes(dtype, shape, rng):
    """Any bits at all, NaNs and subnormals too."""
    size = int(np.prod(shape)) * DTYPES[dtype].itemsize
    values = np.frombuffer(rng.randbytes(size), np.uint8)
    return (values & 1 if dtype == "BOOL" else values).view(DTYPES[dtype]).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(contents, st.integers(0, 2**32), st.integers(1, 200))
def test_what_is_written_is_read_back_bit_for_bit(tmp_path_factory, content, seed, file_bytes):
    directory, rng = tmp_path_factory.mktemp("written"), random.Random(seed)
    arrays = {name: random_bytes(*info, rng) for name, info in content.items()}
    write(directory, content, arrays.__getitem__, file_bytes=file_bytes)
    reader = Reader(directory)
    assert set(reader.tensors) == set(content)
    for name, array in arrays.items():
        found = reader.read(name)
        assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()
        assert reader.tensors[name].start % DTYPES[content[name][0]].itemsize == 0, "not aligned"


def test_a_slice_is_that_of_the_whole_and_survives_release(tmp_path):
    array = np.arange(35, dtype=np.float32).reshape(5, 7).astype(ml_dtypes.bfloat16)
    write(tmp_path, {"a": ("BF16", (5, 7))}, lambda name: array)
    reader = Reader(tmp_path)
    part = (slice(1, 4), slice(2, 7))
    assert (reader.read("a", part) == array[part]).all()
    reader.release("a")
    assert (reader.read("a", part) == array[part]).all()


def test_a_file_by_hand(tmp_path):
    """The bytes of the format's own description: length, header, values."""
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.array([1.5, -2], "<f4").tobytes())
    assert Reader(tmp_path).read("x").tolist() == [1.5, -2]


def test_files_are_limited_named_and_indexed(tmp_path):
    write(tmp_path, {str(i): ("U8", (60,)) for i in range(5)}, lambda name: np.zeros(60, np.uint8), file_bytes=130)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 300}
    assert index["weight_map"] == {str(i): names[i // 2] for i in range(5)}


def whole(tmp_path, header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("header, message", [
    (b"{", "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b"[]", "not a JSON object"),
    (b'{"a":1,"a":1}', "stands twice"),
    ({"a": 3}, "not dtype, shape and data_offsets"),
    ({"a": GOOD | {"dtype": "F31"}}, "dtype 'F31'"),
    ({"a": GOOD | {"dtype": ["F32"]}}, "dtype"),
    ({"a": GOOD | {"shape": [-2]}}, "not dtype, shape and data_offsets"),
    ({"a": GOOD | {"shape": [2.0]}}, "not dtype, shape and data_offsets"),
    ({"a": GOOD | {"shape": [True, 2]}}, "not dtype, shape and data_offsets"),
    ({"a": GOOD | {"shape": [10**30]}}, "not dtype, shape and data_offsets"),
    ({"a": GOOD | {"shape": [1] * 17}}, "not dtype, shape and data_offsets"),
    ({"a": GOOD | {"shape": [3]}}, "has 8 bytes, expected 12"),
    ({"a": GOOD | {"data_offsets": [8, 0]}}, "expected 8"),
    ({"a": GOOD | {"data_offsets": [4, 12]}}, "begins at byte"),
    ({"a": GOOD, "b": GOOD}, "overlap or leave a gap"),
    ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "cut off"),
    ({"a": GOOD | {"shape": [1], "data_offsets": [0, 4]}}, "its tensors end at"),
    ({}, "its tensors end at"),
])
def test_a_header_that_is_wrong_is_an_error(tmp_path, header, message):
    with pytest.raises(UserError, match=message):
        File(whole(tmp_path, header))


@pytest.mark.parametrize("length", [100, 2**40, 2**64 - 1])
def test_a_header_that_claims_more_bytes_than_the_file_is_not_allocated(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(20))
    with pytest.raises(UserError, match=f"claims a header of {length} bytes"):
        File(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_read_as_the_same_tensors_or_is_an_error(tmp_path_factory, data):
    """Any cut, and any changed byte of length and header: never another exception, never bytes outside of the file."""
    directory = tmp_path_factory.mktemp("damaged")
    write(directory, {"a": ("BF16", (3, 4)), "bc": ("F8_E4M3", (5,))},
          lambda name: np.zeros({"a": (3, 4), "bc": 5}[name], DTYPES[{"a": "BF16", "bc": "F8_E4M3"}[name]]))
    path = next(directory.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[:data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 30))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        file = File(path)
    except UserError:
        return
    for name, info in file.tensors.items():
        assert file.read(name).nbytes == info.stop - info.start and info.stop <= len(content)


@pytest.fixture
def sharded(tmp_path):
    write(tmp_path, {name: ("F32", (4,)) for name in "abcd"}, lambda name: np.zeros(4, np.float32), file_bytes=40)
    return tmp_path


def change_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def missing_shard(directory):
    (directory / "model-00002-of-00002.safetensors").unlink()


def truncated_shard(directory):
    path = directory / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def empty_shard(directory):
    (directory / "model-00002-of-00002.safetensors").write_bytes(b"")


ONE, TWO = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.mark.parametrize("damage, message", [
    (missing_shard, "lacks 1 of the files"),
    (truncated_shard, "cut off"),
    (empty_shard, "has 0 bytes"),
    (lambda d: change_index(d, lambda m: m.update(a=TWO)), "which model.safetensors.index.json puts into another file"),
    (lambda d: change_index(d, lambda m: m.update(e=TWO)), "which does not hold it"),
    (lambda d: change_index(d, lambda m: m.update(a="../" + ONE)), "no weight_map"),
    (lambda d: change_index(d, lambda m: m.update(a="/etc/passwd")), "no weight_map"),
    (lambda d: change_index(d, lambda m: m.update(a=3)), "no weight_map"),
    (lambda d: change_index(d, dict.clear), "no weight_map"),
    (lambda d: (d / INDEX).write_text("{"), "not valid JSON"),
    (lambda d: (d / INDEX).unlink(), "has 2 safetensors files and no"),
    (lambda d: (d / "extra.safetensors").write_bytes(b""), "is not named in"),
])
def test_files_and_index_that_contradict_each_other_are_an_error(sharded, damage, message):
    damage(sharded)
    with pytest.raises(UserError, match=message):
        Reader(sharded)


def test_a_tensor_that_the_index_forgets_is_still_known(sharded):
    """It is up to the table of names to want it or to refuse it."""
    change_index(sharded, lambda m: m.pop("b"))
    assert set(Reader(sharded).tensors) == set("abcd")


def test_a_huge_index_is_refused_unread(sharded, monkeypatch):
    monkeypatch.setattr(safetensors, "LONGEST_HEADER", 100)
    with pytest.raises(UserError, match="at most 100"):
        Reader(sharded)


def test_no_directory_is_an_error(tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        Reader(tmp_path / "nothing")
