"""Text to packed token rows on disk: built once, verified on every later use."""

import hashlib
import json
import platform
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dsv3.config import DataConfig, UserError, differences, require, to_dict
from dsv3.data.corpus import Document, corpus_hash, read_corpus, split, text_digest
from dsv3.data.fim import assemble, document_parts
from dsv3.data.packing import pack
from dsv3.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe

MANIFEST = "manifest.json"
BPE_SAMPLE_BYTES = 50_000_000  # about ten seconds of training; the standard library is a quarter of it
DOCUMENTS_A_STEP = 64  # between two updates of the progress bar
READ_LATER = ("eval_stride", "segment_ids")  # fields of DataConfig on which nothing prepared depends


class Prepared(NamedTuple):
    """A corpus ready for training, R rows of L = seq_len + 1 tokens.

    tokens_RL, segment_ids_RL  memory-mapped unsigned integers, see `pack`
    validation_documents       (tokens with bos and, where the document was not cut, eos; bytes of the raw text)
    validation_text            the raw text of the validation documents, one after the other
    manifest                   what was prepared, how much of it, and the sha256 of each file
    """

    tokenizer: Tokenizer
    tokens_RL: np.ndarray
    segment_ids_RL: np.ndarray
    validation_documents: list[tuple[np.ndarray, int]]
    validation_text: bytes
    manifest: dict[str, Any]


def prepare(config: DataConfig, seq_len: int, directory: Path) -> Prepared:
    """Load the preparation in `directory`, or build it there.

    It is built beside `directory` and renamed when finished: a killed build leaves `directory` as it was (and a
    hidden `.<name>.<id>.partial` beside it, safe to delete).

    Raises `UserError` for a corpus that `read_corpus` or `split` rejects, a preparation of another configuration, a
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
    return {"data": fields, "train": {"seq_len": seq_len}}


def _load(config: DataConfig, seq_len: int, directory: Path) -> Prepared:
    require((directory / MANIFEST).is_file(),
            f"{str(directory)!r} holds no prepared data ({MANIFEST} is missing); give an empty or new directory")
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
        found, files = manifest["config"], manifest["files"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{str(directory / MANIFEST)!r} is damaged ({error!r}); delete the directory to prepare it "
                        "again") from error
    changed = differences(found, _identity(config, seq_len))
    require(not changed, f"{str(directory)!r} was prepared with other settings ({'; '.join(changed)}); use those, or "
            "give another directory")
    for name, expected in files.items():
        path = directory / name
        require(path.is_file() and _file_digest(path) == expected,
                f"{str(path)!r} is damaged: its sha256 is not the manifest's; delete the directory to prepare it again")
    tokenizer = Tokenizer.from_json((directory / "tokenizer.json").read_text("utf-8"))
    validation = json.loads((directory / "validation.json").read_text("utf-8"))
    return Prepared(
        tokenizer=tokenizer,
        tokens_RL=np.load(directory / "tokens.npy", mmap_mode="r"),
        segment_ids_RL=np.load(directory / "segment_ids.npy", mmap_mode="r"),
        validation_documents=[_validation_tokens(tokenizer, **document) for document in validation],
        validation_text=b"".join(document["text"].encode() for document in validation),
        manifest=manifest,
    )


def _build(config: DataConfig, seq_len: int, directory: Path) -> None:
    documents = read_corpus(config)
    train, held_out = split(documents, config.validation_fraction)
    tokenizer = byte_tokenizer() if config.tokenizer == "bytes" else train_bpe(
        _bpe_texts(train), config.bpe_vocab_size)
    parts = [document_parts(document.text, config.fim_rate, config.seed) for document in train]
    encoded = list(_encode(tokenizer, parts))
    tokens_RL, segment_ids_RL = pack(encoded, seq_len + 1)
    validation = _validation(held_out, config.eval_bytes)
    scored = sum(len(_validation_tokens(tokenizer, **document)[0]) - 1 for document in validation)

    np.save(directory / "tokens.npy", tokens_RL.astype(_smallest_dtype(tokenizer.vocab_size)))
    np.save(directory / "segment_ids.npy", segment_ids_RL.astype(_smallest_dtype(seq_len + 2)))
    (directory / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
    (directory / "validation.json").write_text(json.dumps(validation), "utf-8")
    train_bytes = _n_bytes(document.text for document in train)
    train_tokens = sum(map(len, encoded))
    validation_bytes = _n_bytes(document["text"] for document in validation)
    manifest = {
        "config": _identity(config, seq_len),
        "corpus_sha256": corpus_hash(documents),
        "python": platform.python_version() if config.path is None else None,
        "vocab_size": tokenizer.vocab_size,
        "train": {
            "documents": len(train), "fim_documents": sum(len(part) == 3 for part in parts), "bytes": train_bytes,
            "tokens": train_tokens, "bytes_per_token": train_bytes / train_tokens,
            "rows": len(tokens_RL), "padding_share": 1 - train_tokens / tokens_RL.size,
        },
        "held_out": {"documents": len(held_out), "bytes": _n_bytes(document.text for document in held_out)},
        "validation": {"documents": len(validation), "bytes": validation_bytes, "scored_tokens": scored,
                       "bytes_per_token": validation_bytes / scored},
        "files": {path.name: _file_digest(path) for path in sorted(directory.iterdir())},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def _by_hash(documents: list[Document]) -> list[Document]:
    """An arbitrary order that is always the same."""
    return sorted(documents, key=lambda document: text_digest(document.text))


def _bpe_texts(train: list[Document]) -> Iterator[str]:
    """Whole documents in the order of their hash until they hold `BPE_SAMPLE_BYTES`."""
    total = 0
    for document in _by_hash(train):
        if total >= BPE_SAMPLE_BYTES:
            return
        yield document.text
        total += len(document.text.encode())


def _encode(tokenizer: Tokenizer, parts: list[tuple[str, ...]]) -> Iterator[np.ndarray]:
    """The assembled tokens of each document; a progress bar appears if this takes over ten seconds."""
    with tqdm(total=len(parts), desc="tokenizing", unit="documents", delay=10) as progress:
        for start in range(0, len(parts), DOCUMENTS_A_STEP):
            group = parts[start:start + DOCUMENTS_A_STEP]
            flat = iter(tokenizer.encode_batch([part for document in group for part in document]))
            yield from (assemble(tokenizer, [next(flat) for _ in document]) for document in group)
            progress.update(len(group))


def _validation(held_out: list[Document], n_bytes: int) -> list[dict[str, Any]]:
    """`n_bytes` of held-out documents in the order of their hash, from each at most an even share among eight.

    So that one long file is not half of the text. Fewer documents than eight divide the bytes among themselves.
    """
    share, room, chosen = -(-n_bytes // min(8, len(held_out))), n_bytes, []
    for document in _by_hash(held_out):
        text = document.text.encode()[:min(share, room)].decode("utf-8", "ignore")  # a character on the cut goes
        if text:
            chosen.append({"name": document.name, "text": text, "complete": text == document.text})
        room -= len(text.encode())
    require(len(chosen) > 0, f"data.eval_bytes {n_bytes} does not hold one character; expected thousands")
    return chosen


def _validation_tokens(tokenizer: Tokenizer, name: str, text: str, complete: bool) -> tuple[np.ndarray, int]:
    tokens = assemble(tokenizer, [tokenizer.encode(text)])
    return tokens if complete else tokens[:-1], len(text.encode())  # a cut document does not end, so it has no eos


def _n_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _smallest_dtype(bound: int) -> type[np.integer]:
    """For values below `bound`."""
    return np.uint16 if bound <= 2**16 else np.int32


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
