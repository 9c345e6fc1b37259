"""Text to packed token rows on disk: built once, verified on every later use."""

import json
import platform
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3.config import DataConfig, differences, require, to_dict
from dsv3.data.build import build, validation_tokens
from dsv3.data.digests import file_digests, json_digest
from dsv3.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
SEAL = "sha256"  # of the rest of the manifest
READ_LATER = ("eval_stride", "segment_ids")  # fields of DataConfig on which nothing prepared depends; weights too


class Shard(NamedTuple):
    """R rows of L = seq_len + 1 tokens, memory-mapped unsigned integers (see `pack`)."""

    tokens_RL: np.ndarray
    segment_ids_RL: np.ndarray


class Prepared(NamedTuple):
    """A corpus ready for training.

    sources               the training rows of each of `DataConfig.sources`
    validation_documents  (tokens with bos and, where the document was not cut, eos; bytes of the raw text)
    validation_text       the raw text of the validation documents, one after the other
    manifest              what was prepared, how much of it, and the sha256 of each file
    """

    tokenizer: Tokenizer
    sources: tuple[tuple[Shard, ...], ...]
    validation_documents: list[tuple[np.ndarray, int]]
    validation_text: bytes
    manifest: dict[str, Any]

    def shards(self) -> Iterator[Shard]:
        """The training rows of all sources."""
        return (shard for shards in self.sources for shard in shards)


def prepare(config: DataConfig, seq_len: int, directory: Path) -> Prepared:
    """Load the preparation in `directory`, or build it there.

    It is built beside `directory` and renamed when finished: a killed build leaves `directory` as it was (and a
    hidden `.<name>.<id>.partial` beside it, safe to delete).

    Raises `UserError` for text that `read_documents` or `build` rejects, a preparation of another configuration, a
    damaged or missing file, and a `directory` that holds something else.
    """
    directory = Path(directory)
    require(seq_len > 0, f"train.seq_len is {seq_len}; expected a positive number")
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
        partial.mkdir(parents=True)
        try:
            _build(config, seq_len, partial)
            partial.rename(directory)
        except OSError:
            if not (directory / MANIFEST).exists():  # unless another process has finished first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _load(config, seq_len, directory)


def _identity(config: DataConfig, seq_len: int) -> dict[str, Any]:
    fields = {name: value for name, value in to_dict(config).items() if name not in READ_LATER}
    fields["sources"] = [{name: source[name] for name in ("files", "text_field")} for source in fields["sources"]]
    return {"data": fields, "train": {"seq_len": seq_len}}


def _build(config: DataConfig, seq_len: int, directory: Path) -> None:
    facts = build(config, seq_len, directory)
    stdlib = any(source.files is None for source in config.sources)
    manifest = {
        "config": _identity(config, seq_len),
        "python": platform.python_version() if stdlib else None,
        **facts,
        "files": file_digests(directory, sorted(
            path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())),
    }
    sealed = manifest | {SEAL: json_digest(manifest)}
    (directory / MANIFEST).write_text(json.dumps(sealed, indent=2) + "\n", "utf-8")


def _read_manifest(path: Path) -> dict[str, Any]:
    """What `_build` wrote, without its seal; `UserError` if anything in it has changed."""
    try:
        manifest = json.loads(path.read_text("utf-8"))
        intact = manifest.pop(SEAL) == json_digest(manifest)
    except (ValueError, LookupError, TypeError, AttributeError):  # a changed byte can make anything of it
        intact = False
    require(intact, f"{str(path)!r} is damaged: it does not have the checksum that it tells; delete the directory to "
            "prepare it again")
    return manifest


def _load(config: DataConfig, seq_len: int, directory: Path) -> Prepared:
    require((directory / MANIFEST).is_file(),
            f"{str(directory)!r} holds no prepared data ({MANIFEST} is missing); give an empty or new directory")
    manifest = _read_manifest(directory / MANIFEST)
    changed = differences(manifest["config"], _identity(config, seq_len))
    require(not changed, f"{str(directory)!r} was prepared with other settings ({'; '.join(changed)}); use those, or "
            "give another directory")
    for name, digest in file_digests(directory, list(manifest["files"])).items():
        require(digest == manifest["files"][name], f"{str(directory / name)!r} is damaged: its sha256 is not the "
                "manifest's; delete the directory to prepare it again")
    tokenizer = Tokenizer.from_json((directory / "tokenizer.json").read_text("utf-8"))
    validation = json.loads((directory / "validation.json").read_text("utf-8"))
    return Prepared(
        tokenizer=tokenizer,
        sources=tuple(
            _shards(directory / f"source_{i}", source["shards"]) for i, source in enumerate(manifest["sources"])),
        validation_documents=[validation_tokens(tokenizer, **document) for document in validation],
        validation_text=b"".join(document["text"].encode() for document in validation),
        manifest=manifest,
    )


def _shards(directory: Path, count: int) -> tuple[Shard, ...]:
    return tuple(Shard(*(np.load(directory / f"{name}_{number:05d}.npy", mmap_mode="r")
                         for name in ("tokens", "segment_ids"))) for number in range(count))
