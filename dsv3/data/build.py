"""From documents to files of packed rows, with one group of documents at a time in memory."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dsv3.config import DataConfig, SourceConfig, require
from dsv3.data.corpus import Document, find_files, held_out, read_documents, text_digest
from dsv3.data.fim import assemble, document_parts
from dsv3.data.packing import pack
from dsv3.data.prefetch import prefetch
from dsv3.data.sample import HashSample
from dsv3.data.split_tokens import Splits, find_splits, split_tokens
from dsv3.data.tokenizer import Tokenizer, byte_tokenizer, deepseek_v3_tokenizer, train_bpe

BPE_SAMPLE_BYTES = 50_000_000  # about ten seconds of training; the standard library is a quarter of it
BATCH_BYTES = 2**21  # of text that is tokenized at once: work for all cores, at 200 bytes of memory a token
GROUP_TOKENS = 2**26  # that are packed together, into one shard
VALIDATION_DOCUMENTS = 8  # the fewest among which the scored text is divided, if there are as many


class Read(NamedTuple):
    """A document with its `text_digest` and its size in bytes of UTF-8."""

    document: Document
    digest: bytes
    n_bytes: int


class Tools(NamedTuple):
    """What turns the documents of every source into tokens."""

    config: DataConfig
    tokenizer: Tokenizer
    splits: Splits


def _read(source: SourceConfig, task: str, n_bytes: int | None) -> Iterator[Read]:
    """The documents of a source; progress is shown after ten seconds, in bytes of text."""
    with tqdm(total=n_bytes, desc=task, unit="B", unit_scale=True, delay=10) as progress:
        for document in read_documents(source.files, source.text_field):
            read = Read(document, text_digest(document.text), len(document.text.encode()))
            yield read
            progress.update(read.n_bytes)


def make_tokenizer(config: DataConfig) -> tuple[Tokenizer, list[int | None]]:
    """The tokenizer that `config` names, and the bytes of each source where it had to read them.

    A BPE is trained on whole training documents of all sources in the order of their digest, `BPE_SAMPLE_BYTES` or a
    little more.
    """
    if config.tokenizer != "bpe":
        make = byte_tokenizer if config.tokenizer == "bytes" else deepseek_v3_tokenizer
        return make(), [None] * len(config.sources)
    sample, sizes = HashSample(BPE_SAMPLE_BYTES), []
    for number, source in enumerate(config.sources):
        sizes.append(0)
        for document, digest, n_bytes in _read(source, f"reading source {number}", None):
            sizes[-1] += n_bytes
            if not held_out(digest, config.validation_fraction):
                sample.add(digest, n_bytes, document)
    documents = tqdm(sample.documents(), desc="training the tokenizer", unit="documents", delay=10)
    return train_bpe((document.text for document in documents), config.bpe_vocab_size), sizes


class SourceBuild:
    """One source on its way to disk. Its held-out documents go to `validation`, and `count` tells what there was."""

    def __init__(self, number: int, n_bytes: int | None, tools: Tools, validation: HashSample) -> None:
        self._number, self._n_bytes, self._tools, self._validation = number, n_bytes, tools, validation
        self.count, self.corpus = Counter(), hashlib.sha256()

    def write(self, row_length: int, directory: Path) -> None:
        """Tokenize, pack and save the training documents, a shard for each `GROUP_TOKENS`."""
        directory.mkdir()
        encoded = prefetch(self._encode, _batches(self._training()), threads=3, ahead=3)
        for number, group in enumerate(_groups(itertools.chain.from_iterable(encoded))):
            tokens_RL, segment_ids_RL = pack(group, row_length)
            token_type = _smallest_dtype(self._tools.tokenizer.vocab_size)
            np.save(directory / f"tokens_{number:05d}.npy", tokens_RL.astype(token_type))
            np.save(directory / f"segment_ids_{number:05d}.npy",
                    segment_ids_RL.astype(_smallest_dtype(row_length + 1)))
            self.count.update(shards=1, rows=len(tokens_RL), tokens=sum(map(len, group)))
        all_documents = self.count["documents"] + self.count["held_out_documents"]
        require(all_documents > 0, f"data.sources.{self._number} holds no text; all of its documents are empty")
        fraction = self._tools.config.validation_fraction
        require(self.count["documents"] > 0, f"data.validation_fraction {fraction} leaves no training document of "
                f"{all_documents} in data.sources.{self._number}; change the fraction, or divide the text into more "
                "documents")

    def _training(self) -> Iterator[tuple[Read, tuple[str, ...]]]:
        """Training documents, whole or cut for FIM."""
        config = self._tools.config
        for read in _read(config.sources[self._number], f"tokenizing source {self._number}", self._n_bytes):
            self.corpus.update(read.digest)
            if held_out(read.digest, config.validation_fraction):
                self.count.update(held_out_documents=1, held_out_bytes=read.n_bytes)
                start = read.document._replace(text=read.document.text[:config.eval_bytes + 1])  # more is not scored
                self._validation.add(read.digest, min(read.n_bytes, _validation_share(config.eval_bytes)), start)
            else:
                parts = document_parts(read.document.text, config.fim_rate, config.seed)
                self.count.update(documents=1, bytes=read.n_bytes, fim_documents=len(parts) == 3)
                yield read, parts

    def _encode(self, batch: Sequence[tuple[Read, tuple[str, ...]]]) -> list[np.ndarray]:
        config, tokenizer, splits = self._tools
        flat = iter(tokenizer.encode_batch([part for _, parts in batch for part in parts]))
        documents = [assemble(tokenizer, [next(flat) for _ in parts]) for _, parts in batch]
        return [split_tokens(splits, tokens, config.split_rate, config.seed, read.digest)
                for (read, _), tokens in zip(batch, documents)]


def build(config: DataConfig, seq_len: int, directory: Path) -> dict[str, Any]:
    """Write `tokenizer.json`, `validation.json` and every source's shards; returns what the manifest tells of them.

    All documents are read twice for a tokenizer that is trained, else once.
    Raises `UserError` for text that `read_documents` rejects, and where a source leaves no training document, or all
    of them no validation document.
    """
    for source in config.sources:
        find_files(source.files)  # a missing file is told before hours of work
    tokenizer, sizes = make_tokenizer(config)
    tools = Tools(config, tokenizer, find_splits(tokenizer))
    validation = HashSample(config.eval_bytes + 4 * VALIDATION_DOCUMENTS)  # a cut may drop a part of a character
    sources = [SourceBuild(number, size, tools, validation) for number, size in enumerate(sizes)]
    for number, source in enumerate(sources):
        source.write(seq_len + 1, directory / f"source_{number}")
    total = sum((source.count for source in sources), Counter())
    require(total["held_out_documents"] > 0, f"data.validation_fraction {config.validation_fraction} leaves no "
            f"validation document of {total['documents']}; change the fraction, or divide the text into more documents")
    scored = choose_validation(validation.documents(), total["held_out_documents"], config.eval_bytes)
    (directory / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
    (directory / "validation.json").write_text(json.dumps(scored), "utf-8")
    return {
        "vocab_size": tokenizer.vocab_size,
        "train": _train_facts(total, seq_len + 1),
        "held_out": _held_out_facts(total),
        "validation": _validation_facts(tokenizer, scored),
        "sources": [{"corpus_sha256": source.corpus.hexdigest(), "shards": source.count["shards"],
                     "train": _train_facts(source.count, seq_len + 1), "held_out": _held_out_facts(source.count)}
                    for source in sources],
    }


def _batches(documents: Iterable[tuple[Read, tuple[str, ...]]]) -> Iterator[list[tuple[Read, tuple[str, ...]]]]:
    return _chunks(documents, lambda document: document[0].n_bytes, BATCH_BYTES)


def _groups(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    return _chunks(documents, len, GROUP_TOKENS)


def _chunks(items, size, limit):
    """Lists of successive items that reach `limit` in the sum of their `size`; the last one may not."""
    chunk, total = [], 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if total >= limit:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def _validation_share(n_bytes: int, n_documents: int = VALIDATION_DOCUMENTS) -> int:
    """The most bytes of one document in a validation text of `n_bytes`."""
    return -(-n_bytes // min(VALIDATION_DOCUMENTS, n_documents))


def choose_validation(documents: Sequence[Document], n_documents: int, n_bytes: int) -> list[dict[str, Any]]:
    """`n_bytes` of held-out `documents` in their order, from each at most an even share among eight.

    So that one long document is not half of the text. Fewer than eight (`n_documents`) divide the bytes among
    themselves.
    """
    share, room, chosen = _validation_share(n_bytes, n_documents), n_bytes, []
    for document in documents:
        text = document.text.encode()[:min(share, room)].decode("utf-8", "ignore")  # a character on the cut goes
        if text:
            chosen.append({"name": document.name, "text": text, "complete": text == document.text})
        room -= len(text.encode())
    require(len(chosen) > 0, f"data.eval_bytes {n_bytes} does not hold one character; expected thousands")
    return chosen


def validation_tokens(tokenizer: Tokenizer, name: str, text: str, complete: bool) -> tuple[np.ndarray, int]:
    """(tokens, bytes of the text) of a document that `choose_validation` chose; a cut one does not end, without eos."""
    tokens = assemble(tokenizer, [tokenizer.encode(text)])
    return tokens if complete else tokens[:-1], len(text.encode())


def _train_facts(count: Counter, row_length: int) -> dict[str, Any]:
    return {name: count[name] for name in ("documents", "fim_documents", "bytes", "tokens", "rows")} | {
        "bytes_per_token": count["bytes"] / count["tokens"],
        "padding_share": 1 - count["tokens"] / (count["rows"] * row_length)}


def _held_out_facts(count: Counter) -> dict[str, Any]:
    return {"documents": count["held_out_documents"], "bytes": count["held_out_bytes"]}


def _validation_facts(tokenizer: Tokenizer, scored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n_bytes = sum(len(document["text"].encode()) for document in scored)
    n_tokens = sum(len(validation_tokens(tokenizer, **document)[0]) - 1 for document in scored)
    return {"documents": len(scored), "bytes": n_bytes, "scored_tokens": n_tokens,
            "bytes_per_token": n_bytes / n_tokens}


def _smallest_dtype(bound: int) -> type[np.integer]:
    """For values below `bound`."""
    return np.uint16 if bound <= 2**16 else np.int32
