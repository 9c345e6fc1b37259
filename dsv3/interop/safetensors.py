"""The safetensors format: read in place, written as a stream, E4M3 included.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, offsets) and the
bytes of its tensors without a gap. A checkpoint is one such file, or several with an index (name -> file).
The numpy back end of the usual package cannot carry E4M3.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsv3.config import UserError, require

DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation. Also that of an index."""
FILE_BYTES = 5_000_000_000
METADATA = "__metadata__"


class TensorInfo(NamedTuple):
    """A tensor of a file: `start` and `stop` count bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class File:
    """One safetensors file, memory-mapped; `tensors` is its header, every claim of which was checked.

    Raises `UserError` for a file that is not one, is cut off or longer than its header says, or has tensors that
    overlap, leave gaps, have an unknown dtype, or a size other than that of their shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                require(size > 8, f"{path} has {size} bytes; a safetensors file has more than 8; download it again")
                length = int.from_bytes(file.read(8), "little")
                require(length <= min(size - 8, LONGEST_HEADER), f"{path} claims a header of {length} bytes, but has "
                        f"{size} bytes (and a header at most {LONGEST_HEADER}); download it again")
                self.tensors = _parse_header(path, file.read(length), 8 + length, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; download it again") from None
        self._bytes = np.frombuffer(self._map, np.uint8)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A view of (a part of) a tensor. Its bytes come from the disk when they are looked at."""
        info = self.tensors[name]
        return self._bytes[info.start:info.stop].view(DTYPES[info.dtype]).reshape(info.shape)[index]

    def release(self, name: str) -> None:
        """Give the memory of a tensor's pages back; a later look reads them again."""
        info = self.tensors[name]
        start = info.start - info.start % mmap.PAGESIZE
        if info.stop > info.start:
            self._map.madvise(mmap.MADV_DONTNEED, start, info.stop - start)


def _parse_header(path: Path, text: bytes, start: int, size: int) -> dict[str, TensorInfo]:
    """The header's tensors in order of their bytes, which fill the file from `start` to `size`."""
    header = parse_json(text, f"the header of {path}")
    header.pop(METADATA, None)
    tensors = {name: _tensor_info(path, name, entry, start) for name, entry in header.items()}
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        require(info.start == end, f"{path}: tensor {name!r} begins at byte {info.start}, expected {end}: tensors "
                "overlap or leave a gap; download it again")
        require(info.stop <= size, f"{path}: tensor {name!r} ends at byte {info.stop} of a file of {size}: it is cut "
                "off; download it again")
        end = info.stop
    require(end == size, f"{path} has {size} bytes, but its tensors end at {end}; download it again")
    return tensors


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    whole = lambda values: isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)
    require(isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} == set(entry) and whole(entry["shape"])
            and len(entry["shape"]) <= 16 and whole(entry["data_offsets"]) and len(entry["data_offsets"]) == 2,
            f"{path}: the header's entry of {name!r} is not dtype, shape and data_offsets: {str(entry)[:200]}")
    dtype = entry["dtype"]
    require(isinstance(dtype, str) and dtype in DTYPES, f"{path}: tensor {name!r} has dtype {str(dtype)[:40]!r}; "
            f"expected one of {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    expected = math.prod(entry["shape"]) * DTYPES[dtype].itemsize
    require(end - begin == expected, f"{path}: tensor {name!r} of shape {entry['shape']} and dtype {dtype} has "
            f"{end - begin} bytes, expected {expected}")
    return TensorInfo(dtype, tuple(entry["shape"]), start + begin, start + end)


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys; `UserError` for anything else, said of `what`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON ({str(error)[:200]})") from error
    require(isinstance(value, dict), f"{what} is not a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of bounded size. Raises `UserError`."""
    require(path.is_file(), f"{path} is missing")
    size = path.stat().st_size
    require(size <= LONGEST_HEADER, f"{path} has {size} bytes; expected JSON of at most {LONGEST_HEADER}")
    return parse_json(path.read_bytes(), str(path))


class Reader:
    """All tensors of a checkpoint in `directory`, whichever files hold them.

    Raises `UserError` when a file is missing or bad (see `File`), or the index and the files contradict each other.
    """

    def __init__(self, directory: Path) -> None:
        require(directory.is_dir(), f"{directory} is not a directory; expected a downloaded checkpoint")
        self.directory = directory
        places = _places(directory)
        files = {name: File(directory / name) for name in sorted(set(places.values()))}
        self._file = {tensor: files[name] for tensor, name in places.items()}
        for name, file in files.items():
            stray = [tensor for tensor in file.tensors if places.setdefault(tensor, name) != name]
            require(not stray, f"{file.path} holds {stray[:1]}, which {INDEX} puts into another file")
            absent = next((t for t, place in places.items() if place == name and t not in file.tensors), None)
            require(absent is None, f"{INDEX} puts {absent!r} into {file.path}, which does not hold it")
            self._file |= dict.fromkeys(file.tensors, file)
        self.tensors = {name: file.tensors[name] for name, file in self._file.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """See `File.read`."""
        return self._file[name].read(name, index)

    def release(self, name: str) -> None:
        """See `File.release`."""
        self._file[name].release(name)


def _places(directory: Path) -> dict[str, str]:
    """Tensor -> file name, by the index, or of the only file there is (then without any tensor to look up)."""
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if not (directory / INDEX).exists():
        require(len(found) == 1, f"{directory} has {len(found)} safetensors files and no {INDEX}; expected a "
                "downloaded checkpoint")
        return dict.fromkeys(File(directory / found[0]).tensors, found[0])
    places = read_json(directory / INDEX).get("weight_map")
    plain = lambda name: isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
    require(isinstance(places, dict) and len(places) > 0 and all(map(plain, places.values())),
            f"{directory / INDEX} has no weight_map of tensor names to safetensors files beside it")
    missing = sorted(set(places.values()) - set(found))
    require(not missing, f"{directory} lacks {len(missing)} of the files that {INDEX} names, the first is "
            f"{(missing or [''])[0]}; download it again")
    unnamed = sorted(set(found) - set(places.values()))
    require(not unnamed, f"{directory / (unnamed or [''])[0]} is not named in {INDEX}; remove it or download again")
    return places


def write(
    directory: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], produce: Callable[[str], np.ndarray], *,
    file_bytes: int = FILE_BYTES, done: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write a checkpoint into `directory`: `shapes` maps every tensor to (dtype, shape), `produce` makes one at a time.

    Files hold at most `file_bytes` unless a single tensor is larger. `done` hears of every tensor's bytes. Within a
    file wider elements come first, so that every tensor is aligned to its own. A file appears by a rename when it is
    complete; one that is there already is taken as written.
    """
    files = _plan(shapes, file_bytes)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for file_name, tensors in zip(names, files, strict=True):
        if (directory / file_name).exists():
            done(sum(n_bytes(*shapes[name]) for name in tensors))
            continue
        unfinished = directory / f"{file_name}.part"
        with unfinished.open("wb") as file:
            file.write(_header({name: shapes[name] for name in tensors}))
            for name in tensors:
                array, (dtype, shape) = produce(name), shapes[name]
                assert array.dtype == DTYPES[dtype] and array.shape == shape, (name, array.dtype, array.shape, shape)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                done(array.nbytes)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(directory / file_name)
    index = {"metadata": {"total_size": sum(n_bytes(*info) for info in shapes.values())},
             "weight_map": {name: file for file, tensors in zip(names, files, strict=True) for name in tensors}}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def n_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def _plan(shapes: Mapping[str, tuple[str, tuple[int, ...]]], file_bytes: int) -> list[list[str]]:
    """Tensors of each file, in their given order as far as alignment allows."""
    files, room = [], 0
    for name, info in shapes.items():
        if not files or n_bytes(*info) > room:
            files.append([])
            room = file_bytes
        files[-1].append(name)
        room -= n_bytes(*info)
    return [sorted(names, key=lambda name: -DTYPES[shapes[name][0]].itemsize) for names in files]


def _header(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The length and the header, padded to whole words of eight bytes."""
    entries, end = {METADATA: {"format": "pt"}}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + n_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
