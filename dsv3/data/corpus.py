"""Reads text files into documents and divides them into training and validation."""

import hashlib
import io
import logging
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dsv3.config import DataConfig, UserError, require

# Directories of the standard library that are not it (installed packages) or not prose to learn from (tests: huge
# generated tables, deliberate syntax errors, files in odd encodings).
EXCLUDED_FROM_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})


class Document(NamedTuple):
    """One text file: its path below the corpus root with forward slashes, and its text with line ends as they were."""

    name: str
    text: str


def text_digest(text: str) -> bytes:
    """sha256 of the UTF-8 text: the document's identity, on which its side of the split and its FIM cuts depend."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()  # file names may hold stray bytes


def _matching(root: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    try:
        paths = set(root.rglob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"data.pattern {pattern!r} is not a relative glob ({error}); try '*.txt'") from error
    return ((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())


def _stdlib_files(pattern: str) -> Iterator[tuple[str, Path]]:
    found = _matching(Path(sysconfig.get_paths()["stdlib"]), pattern)
    return ((name, path) for name, path in found if not EXCLUDED_FROM_STDLIB & set(name.split("/")))


def _user_files(root: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    require(root.exists(), f"data.path {str(root)!r} does not exist; give a text file or a directory of text files")
    return iter([(root.name, root)]) if root.is_file() else _matching(root, pattern)


def _read(path: Path, python_source: bool) -> str:
    try:
        raw = path.read_bytes()
        encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0] if python_source else "utf-8"
        return raw.decode(encoding)
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise UserError(f"cannot read {str(path)!r} as text ({error}); convert it to UTF-8, or exclude it with "
                        "data.pattern") from error


def read_corpus(config: DataConfig) -> list[Document]:
    """All documents of the corpus, sorted by name.

    `config.path` is a text file, or a directory in which `config.pattern` is matched at any depth; files are UTF-8.
    `None` is the running Python's standard library without `EXCLUDED_FROM_STDLIB`, each file in the encoding it
    declares. Empty files hold nothing to learn and are left out; their number is logged. Every other file is kept,
    identical ones too.

    Raises `UserError` for a missing path, a file that cannot be read or decoded, or no text at all.
    """
    stdlib = config.path is None
    files = sorted(_stdlib_files(config.pattern) if stdlib else _user_files(Path(config.path), config.pattern))
    where = "the standard library" if stdlib else f"data.path {config.path!r}"
    require(len(files) > 0, f"no file matches data.pattern {config.pattern!r} in {where}; change the pattern or path")
    documents = [Document(name, text) for name, path in files if (text := _read(path, stdlib))]
    require(len(documents) > 0, f"all {len(files)} files matching {config.pattern!r} in {where} are empty")
    logging.getLogger(__name__).info(
        "read %d documents from %s; left out %d empty files", len(documents), where, len(files) - len(documents))
    return documents


def corpus_hash(documents: list[Document]) -> str:
    """sha256 (hex) over the names and texts in order; each is hashed by itself first, so no two lists run together."""
    total = hashlib.sha256()
    for document in documents:
        total.update(text_digest(document.name) + text_digest(document.text))
    return total.hexdigest()


def split(documents: list[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, both in the order given.

    A document is held out when its sha256, read as a binary fraction in [0, 1), is below `validation_fraction`. So its
    side depends on nothing but its text: it stays when documents are added, and identical copies stay together.

    Raises `UserError` when a side is empty.
    """
    limit = round(validation_fraction * 2**64)
    held_out = [int.from_bytes(text_digest(document.text)[:8], "big") < limit for document in documents]
    train = [document for document, out in zip(documents, held_out) if not out]
    validation = [document for document, out in zip(documents, held_out) if out]
    for side, name in ((train, "training"), (validation, "validation")):
        require(len(side) > 0, f"data.validation_fraction {validation_fraction} leaves no {name} document of "
                f"{len(documents)}; change the fraction, or divide the text into more files")
    return train, validation
