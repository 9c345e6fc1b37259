"""sha256 of files, several at a time, and of what JSON can hold."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

CHUNK = 2**20  # bytes: large enough that threads hash rather than wait for one another


def _digest(progress: tqdm, path: Path) -> str | None:
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()


def file_digests(directory: Path, names: Sequence[str]) -> dict[str, str | None]:
    """sha256 (hex) of each file below `directory`, None where there is none; progress is shown after ten seconds."""
    paths = [directory / name for name in names]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    with tqdm(total=size, desc="hashing", unit="B", unit_scale=True, delay=10) as progress, \
            ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(functools.partial(_digest, progress), paths)))


def json_digest(value: Any) -> str:
    """sha256 (hex) of a JSON value, whatever its white space and the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
