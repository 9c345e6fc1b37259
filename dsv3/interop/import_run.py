"""A Hugging Face checkpoint as a run: step 0 of a workdir, from which one generates, trains on, or exports again."""

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from dsv3.config import Config, UserError, require
from dsv3.data.tokenizer import released_tokenizer
from dsv3.interop.layout import Entry, leaf_shapes
from dsv3.interop.load import Source, check_copies, open_source, read_part
from dsv3.interop.safetensors import INDEX
from dsv3.train import mapped
from dsv3.train.checkpoint import Description, finish_imported

HF = "hf"
"""Directory of a workdir for what came with the weights: configuration, tokenizer, chat template, code."""
TRAVELS = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
LARGEST_FILE = 100_000_000
FLUSH_BYTES, FLUSH_SECONDS = 1 << 28, 5.0
"""How much a killed import has to do again."""


def import_checkpoint(hf: Path, workdir: Path, template: Config, *, dtype: str | None = None, workers: int = 2) -> None:
    """Make `workdir` a run whose step 0 holds the weights in `hf`; `template` gives all of its config but the model.

    `dtype` None keeps every tensor as it is stored, FP8 with its scales; "bfloat16" and "float32" dequantise. Whatever
    it is, `load_run` and training see float32.

    Tensors are read and written one at a time, one in memory for each of `workers`; the checkpoint appears by a rename
    at the end. An import that was killed continues where it was. Raises `UserError` as `open_source` and `load`, and
    for a workdir that holds a run or another unfinished import; a checkpoint found bad on the way leaves nothing.
    """
    require(jax.process_count() == 1, "import is the work of one process; start it without a launcher")
    require(not (workdir / "checkpoints" / "0").exists() and not any((workdir / "checkpoints").glob("[0-9]*")),
            f"--workdir={workdir} holds a run already; choose another")
    source = open_source(hf, dtype)
    config = dataclasses.replace(template, model=source.config)
    partial = workdir / "import.partial"
    _begin(partial, source, dtype)
    try:
        arrays = _fill(partial, source, workers)
        check_copies(source)
        _copy_files(hf, partial / HF)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_if_empty(workdir)
        raise
    marks = {name: mapped.fingerprint(array) for name, array in tqdm(arrays.items(), "fingerprints", disable=None)}
    shapes = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    shutil.rmtree(workdir / HF, ignore_errors=True)
    (partial / HF).rename(workdir / HF)
    description = Description(config, _tokenizer(hf), {})
    finish_imported(partial / "arrays", workdir, description, shapes, marks)
    shutil.rmtree(partial)


def _begin(partial: Path, source: Source, dtype: str | None) -> None:
    """Create the staging area, or find the one that an import of the same files has left."""
    files = sorted(path for path in source.reader.directory.iterdir() if path.suffix == ".safetensors")
    plan = {"hf": source.hf, "dtype": dtype, "files": [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]}
    text = json.dumps(plan, sort_keys=True)
    digest, file = hashlib.sha256(text.encode()).hexdigest(), partial / "plan"
    if file.exists():
        require(file.read_text() == digest, f"{partial} is an unfinished import of other files, or with another "
                "--dtype; finish it with the same command, or remove it")
        return
    partial.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".new").write_text(digest)
    file.with_suffix(".new").rename(file)


def _fill(partial: Path, source: Source, workers: int) -> dict[str, np.memmap]:
    """The staged arrays, after every tensor that the journal does not name was read into them."""
    arrays = {"/".join(path): mapped.create(partial / "arrays", "/".join(path), str(source.dtypes[path]), shape)
              for path, shape in leaf_shapes(source.entries).items()}
    with _Journal(partial / "journal", arrays) as journal:
        todo = [entry for entry in source.entries if not entry.copy and entry.name not in journal.done]
        total = sum(_bytes(source, entry) for entry in source.entries if not entry.copy)
        left = sum(_bytes(source, entry) for entry in todo)
        with tqdm(total=total, initial=total - left, unit="B", unit_scale=True, desc="import", disable=None) as bar:
            for entry in _in_threads(lambda entry: _copy(source, entry, arrays), todo, workers):
                bar.update(_bytes(source, entry))
                journal.add(entry.name, _bytes(source, entry))
    return arrays


def _copy(source: Source, entry: Entry, arrays: dict[str, np.memmap]) -> Entry:
    arrays["/".join(entry.path)][entry.place] = read_part(source, entry, entry.place)
    source.reader.release(entry.name)
    return entry


def _bytes(source: Source, entry: Entry) -> int:
    info = source.reader.tensors[entry.name]
    return info.stop - info.start


def _in_threads(work, items: list, workers: int) -> Iterator:
    """Results as they come, with at most one item of work under way and one waiting for each worker."""
    with ThreadPoolExecutor(workers) as pool:
        pending: set[Future] = set()
        rest = iter(items)
        try:
            while True:
                while len(pending) < 2 * workers and (item := next(rest, None)) is not None:
                    pending.add(pool.submit(work, item))
                if not pending:
                    return
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        finally:
            for future in pending:
                future.cancel()


class _Journal:
    """Names of the tensors that are on the disk, in a file that only grows. Use as a context manager."""

    def __init__(self, path: Path, arrays: dict[str, np.memmap]) -> None:
        self._path, self._arrays = path, arrays
        # A line that was cut off by a kill does not count.
        self.done = set(path.read_text().split("\n")[:-1]) if path.exists() else set()
        self._names: list[str] = []
        self._bytes, self._since = 0, time.monotonic()

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def add(self, name: str, n_bytes: int) -> None:
        """Note a tensor; it is written down when its bytes are on the disk, every few seconds."""
        self._names.append(name)
        self._bytes += n_bytes
        if self._bytes > FLUSH_BYTES or time.monotonic() - self._since > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        for array in self._arrays.values():
            array.flush()
            mapped.release(array)
        with self._path.open("a") as file:
            file.write("".join(f"{name}\n" for name in self._names))
        self._names, self._bytes, self._since = [], 0, time.monotonic()


def _copy_files(hf: Path, destination: Path) -> None:
    """Everything that travels with the weights."""
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir()
    for path in [*hf.iterdir(), *hf.glob("additional_chat_templates/*.jinja")]:
        if path.is_file() and path.suffix in TRAVELS and path.name != INDEX:
            require(path.stat().st_size <= LARGEST_FILE, f"{path} has more than {LARGEST_FILE} bytes, too many for a "
                    "file beside the weights; remove it")
            target = destination / path.relative_to(hf)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _tokenizer(hf: Path) -> str:
    """The tokenizer's JSON; empty where there is none, or one of another kind: then only text is missed."""
    if not (hf / "tokenizer.json").is_file():
        logging.warning("%s has no tokenizer.json: the imported run reads and writes no text", hf)
        return ""
    try:
        return released_tokenizer((hf / "tokenizer.json").read_text("utf-8")).to_json()
    except (UserError, UnicodeDecodeError) as error:
        logging.warning("%s: %s; the imported run reads and writes no text", hf / "tokenizer.json", error)
        return ""


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        pass  # it holds something of the user's
