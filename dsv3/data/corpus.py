"""Files of text and of records into documents, one after the other."""

import glob
import gzip
import hashlib
import io
import json
import logging
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dsv3.config import UserError, require

# Directories of the standard library that are not it (installed packages) or not prose to learn from (tests: huge
# generated tables, deliberate syntax errors, files in odd encodings).
EXCLUDED_FROM_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
KNOWN_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".jsonl.gz", ".parquet")
"""What is read of a directory. A file that is named, or that a glob matches, is text unless it ends in the last three."""
RECORDS_A_STEP = 256  # of a Parquet table: long documents make large batches


class Document(NamedTuple):
    """A text and where it stands: `path`, or `path:record` with records counted from 1. Line ends are as they were."""

    name: str
    text: str


def text_digest(text: str) -> bytes:
    """sha256 of the UTF-8 text: the document's identity, on which its side of the split and its FIM cuts depend."""
    return hashlib.sha256(text.encode()).digest()


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if path.is_file() and not EXCLUDED_FROM_STDLIB & set(name.parts):
            yield name.as_posix(), path


def _matching(entry: str) -> list[Path]:
    """The files that one entry of `SourceConfig.files` stands for."""
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.name.endswith(KNOWN_SUFFIXES) and file.is_file()]
        require(len(found) > 0, f"{entry!r} holds no file that ends in {', '.join(KNOWN_SUFFIXES)}; to read others as "
                f"text, name them by a glob such as {str(path / '**' / '*.c')!r}")
        return found
    require(any(character in entry for character in "*?["), f"{entry!r} does not exist; give a file, a directory or a "
            "glob to data.sources")
    found = [file for file in map(Path, glob.iglob(str(path), recursive=True)) if file.is_file()]
    require(len(found) > 0, f"no file matches {entry!r}; change data.sources")
    return found


def find_files(files: Sequence[str] | None) -> list[tuple[str, Path]]:
    """(name, path) of every file of a source (`SourceConfig.files`), sorted by name, each once.

    Raises `UserError` for an entry that stands for no file.
    """
    if files is None:
        return sorted(_stdlib_files())
    return sorted({path.as_posix(): path for entry in files for path in _matching(entry)}.items())


def _text_records(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    raw = path.read_bytes()
    # Python source says in which encoding it is written; without a word it is UTF-8, as all other text has to be.
    encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0] if path.suffix == ".py" else "utf-8"
    yield 0, raw.decode(encoding)


def _json_records(path: Path, text_field: str) -> Iterator[tuple[int, object]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"record {number} of {str(path)!r} is not a line of JSON in UTF-8 ({error})") from error
            require(isinstance(record, dict) and text_field in record, f"record {number} of {str(path)!r} has no field "
                    f"{text_field!r}; set text_field of its source, or correct the record")
            yield number, record[text_field]


def _parquet_records(path: Path, text_field: str) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {str(path)!r} needs pyarrow; pip install 'dsv3[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            require(text_field in columns, f"{str(path)!r} has no column {text_field!r}; set text_field of its source "
                    f"to one of: {', '.join(columns)}")
            number = 0
            for batch in table.iter_batches(RECORDS_A_STEP, columns=[text_field]):
                for value in batch.column(text_field):
                    number += 1
                    yield number, value.as_py()
    except pyarrow.ArrowException as error:
        raise UserError(f"{str(path)!r} is not a readable Parquet file ({' '.join(str(error).split())})") from error


def _reader(path: Path) -> Callable[[Path, str], Iterator[tuple[int, object]]]:
    if path.suffix == ".parquet":
        return _parquet_records
    return _json_records if path.name.endswith((".jsonl", ".jsonl.gz")) else _text_records


def _documents_of(name: str, path: Path, text_field: str) -> Iterator[Document]:
    number = 0
    try:
        for number, text in _reader(path)(path, text_field):
            place = f"record {number} of {str(path)!r}" if number else repr(str(path))
            require(isinstance(text, str), f"{place}: field {text_field!r} is {text!r:.40}, not a text; correct the "
                    "record, or set text_field of its source")
            require(text.isascii() or text == text.encode("utf-8", "replace").decode(), f"{place} holds half of a "
                    "surrogate pair, which is no character; correct the text")
            yield Document(f"{name}:{number}" if number else name, text)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, LookupError, SyntaxError) as error:
        where = f"{str(path)!r} after record {number}" if number else repr(str(path))
        raise UserError(f"cannot read {where} ({error}); convert it to UTF-8, repair it, or leave it out of "
                        "data.sources") from error


def read_documents(files: Sequence[str] | None, text_field: str) -> Iterator[Document]:
    """The documents of a source, one at a time, ordered by file name and then by their place in the file.

    A text file is one document, each line of `.jsonl` and `.jsonl.gz` and each row of `.parquet` another. Text is
    UTF-8, Python source the encoding that it declares. Documents without a character hold nothing to learn: they are
    left out and, at the end, their number is logged. All others are kept, identical ones too.

    Raises `UserError`, naming the file and the record, for whatever cannot be read as `SourceConfig` describes it.
    """
    kept = empty = 0
    for name, path in find_files(files):
        for document in _documents_of(name, path, text_field):
            if document.text:
                kept += 1
                yield document
            else:
                empty += 1
    where = "the standard library" if files is None else ", ".join(files)
    logging.getLogger(__name__).info("read %d documents from %s; left out %d empty ones", kept, where, empty)


def held_out(digest: bytes, validation_fraction: float) -> bool:
    """Whether a document is for validation: its `text_digest`, read as a binary fraction in [0, 1), is below this one.

    So its side depends on nothing but its text: it stays when documents are added, and copies stay together.
    """
    return int.from_bytes(digest[:8], "big") < round(validation_fraction * 2**64)
