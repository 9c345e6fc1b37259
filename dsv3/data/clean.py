"""A corpus without bad documents and duplicates, written once as shards that a training run reads."""

import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dsv3.config import UserError, require, to_dict
from dsv3.config.schema import Node
from dsv3.data.corpus import Document
from dsv3.data.dedup import Deduplicator, NearConfig, Sketch, digest, sketch
from dsv3.data.quality import RULES, Limits, first_failure

REPORT = "report.json"
SHARD_BYTES = 64_000_000  # of text; a quarter of it on disk
BATCH_BYTES = 1_000_000  # of text sent to a worker at once
BATCH_DOCUMENTS = 256
EXAMPLES = 5  # names in the report for each rule
EXACT, NEAR = "exact_duplicate", "near_duplicate"


@dataclass(frozen=True, kw_only=True)
class CleanConfig(Node):
    """What is dropped: documents that one of `rules` rejects, then copies, then (unless `near` is None) similar ones.

    `rules` are names in `dsv3.data.quality.RULES`; `limits` holds their numbers. `duplicates=False` keeps copies too.
    """

    rules: tuple[str, ...]
    limits: Limits
    duplicates: bool
    near: NearConfig | None

    def validate(self) -> None:
        unknown = [name for name in self.rules if name not in RULES]
        require(not unknown, f"rules {unknown} do not exist; expected some of {', '.join(RULES)}")
        require(self.duplicates or self.near is None, "near duplicates are dropped only where exact ones are")


class Examined(NamedTuple):
    """What a worker finds out about one document; `sketch` is None where nobody will ask for it."""

    n_bytes: int
    failed: str | None
    digest: bytes
    sketch: Sketch | None


def examine(texts: list[str], config: CleanConfig) -> list[Examined]:
    """The work on each document that depends on no other."""
    found = []
    for text in texts:
        failed = first_failure(text, config.rules, config.limits)
        drawn = sketch(text, config.near) if failed is None and config.near is not None else None
        found.append(Examined(len(text.encode("utf-8", "surrogatepass")), failed, digest(text), drawn))
    return found


class Tally:
    """Documents and bytes read, kept and dropped by each rule, with the first few dropped by each.

    An example is the dropped document's name and, for a duplicate, that of the document it repeats.
    """

    def __init__(self, config: CleanConfig):
        reasons = [*config.rules, *[EXACT] * config.duplicates, *[NEAR] * (config.near is not None)]
        self.counts = {name: {"documents": 0, "bytes": 0} for name in ("read", "kept", *reasons)}
        self.examples: dict[str, list[tuple[str, ...]]] = {name: [] for name in reasons}

    def add(self, outcome: str, n_bytes: int, names: tuple[str, ...]) -> None:
        for row in (self.counts["read"], self.counts[outcome]):
            row["documents"] += 1
            row["bytes"] += n_bytes
        if outcome != "kept" and len(self.examples[outcome]) < EXAMPLES:
            self.examples[outcome].append(names)


def clean(documents: Iterable[Document], directory: Path, config: CleanConfig, workers: int) -> dict:
    """Write the documents worth keeping to `directory` and return the report, which is written beside them.

    The shards `part-00000.jsonl.gz`, ... hold lines {"text": ..., "name": ...} in the order of `documents`, about
    `SHARD_BYTES` of text each; `report.json` holds counts, examples, settings and the sha256 of each shard. All are
    built beside `directory` and renamed when complete: a killed run leaves `directory` as it was (and a hidden
    `.<name>.<id>.partial` beside it, safe to delete). The bytes written depend on documents and config alone, not on
    the number of worker processes. `documents` is read once and never held as a whole.

    Raises `UserError` for a `directory` with something in it and when no document is kept.
    """
    directory = Path(directory)
    require(workers > 0, f"workers is {workers}; expected a positive number of processes")
    require(not directory.exists() or (directory.is_dir() and not any(directory.iterdir())),
            f"{str(directory)!r} exists and is not an empty directory; give a new one, or delete it")
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        report = _build(documents, partial, config, workers)
        partial.rename(directory)
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, perhaps for want of memory; use fewer --workers") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _build(documents: Iterable[Document], directory: Path, config: CleanConfig, workers: int) -> dict:
    tally, shards = Tally(config), []
    # spawn: a fork of a process with threads may hang, and the caller may have some (JAX does)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    seen = Deduplicator(config.near, directory) if config.duplicates else None
    try:
        kept = _decide(documents, pool, workers, config, seen, tally)
        for number, (shard_documents, n_bytes, lines) in enumerate(_shards(kept)):
            if shards:
                shards[-1][-1].result()  # two shards in memory at most
            name = f"part-{number:05d}.jsonl.gz"
            shards.append((name, shard_documents, n_bytes, pool.submit(_write, directory / name, lines)))
        files = {name: {"documents": count, "bytes": n_bytes, "sha256": written.result()}
                 for name, count, n_bytes, written in shards}
    finally:
        pool.shutdown(cancel_futures=True)
        if seen is not None:
            seen.close()
    dropped = ", ".join(f"{name} {row['documents']}" for name, row in tally.counts.items() if row["documents"])
    require(len(files) > 0, f"no document is left ({dropped or 'none was read'}); choose other rules or limits")
    report = {"counts": tally.counts, "examples": tally.examples, "config": to_dict(config), "files": files}
    (directory / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for ever: it holds the other end of its own queue."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _examined(documents: Iterable[Document], pool: ProcessPoolExecutor, workers: int,
              config: CleanConfig) -> Iterator[tuple[Document, Examined]]:
    """Documents in their order with what the workers found, a few batches ahead of what is asked for."""
    waiting: deque[tuple[list[Document], Future]] = deque()
    for batch in _batches(documents):
        waiting.append((batch, pool.submit(examine, [document.text for document in batch], config)))
        if len(waiting) > 3 * workers:
            first, future = waiting.popleft()
            yield from zip(first, future.result(), strict=True)
    for batch, future in waiting:
        yield from zip(batch, future.result(), strict=True)


def _decide(documents: Iterable[Document], pool: ProcessPoolExecutor, workers: int, config: CleanConfig,
            seen: Deduplicator | None, tally: Tally) -> Iterator[tuple[Document, int]]:
    """The documents to keep and their bytes; `tally` hears of all. A progress bar appears after ten seconds."""
    with tqdm(desc="cleaning", unit="B", unit_scale=True, delay=10) as progress:
        for document, found in _examined(documents, pool, workers, config):
            outcome, names = found.failed or "kept", (document.name,)
            if outcome == "kept" and seen is not None:
                duplicate = seen.duplicate_of(document.name, found.digest, found.sketch)
                if duplicate is not None:
                    outcome = {"exact": EXACT, "near": NEAR}[duplicate[0]]
                    names = (document.name, duplicate[1])
            tally.add(outcome, found.n_bytes, names)
            progress.update(found.n_bytes)
            if outcome == "kept":
                yield document, found.n_bytes


def _shards(kept: Iterable[tuple[Document, int]]) -> Iterator[tuple[int, int, bytes]]:
    """(documents, bytes of text, lines of JSON) for each shard."""
    lines: list[bytes] = []
    size = 0
    for document, n_bytes in kept:
        lines.append(_line(document))
        size += n_bytes
        if size >= SHARD_BYTES:
            yield len(lines), size, b"".join(lines)
            lines, size = [], 0
    if lines:
        yield len(lines), size, b"".join(lines)


def _line(document: Document) -> bytes:
    record = {"text": document.text, "name": document.name}
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair (in a file's name, say) is written as its escape
        return json.dumps(record).encode() + b"\n"


def _write(path: Path, lines: bytes) -> str:
    """Compress into `path`, without the time of day; returns the sha256 of the file."""
    compressed = gzip.compress(lines, compresslevel=6, mtime=0)
    path.write_bytes(compressed)
    return hashlib.sha256(compressed).hexdigest()
