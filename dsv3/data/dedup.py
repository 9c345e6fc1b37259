"""Duplicates: equal texts by their hash, similar ones by MinHash and locality-sensitive hashing, verified."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv3.config import UserError, require
from dsv3.config.schema import Node
from dsv3.data.corpus import Document
from dsv3.data.shingles import Unit, shingles

# What a missed pair costs beside a pair looked up in vain: every candidate is verified, so that looking up is cheap.
LSH_WEIGHTS = (0.1, 0.9)
SHINGLES_A_STEP = 1024  # by num_perm 32-bit hashes: half a megabyte, which stays in a core's cache


@dataclass(frozen=True, kw_only=True)
class NearConfig(Node):
    """Two documents are near duplicates when the Jaccard index of their sets of shingles is at least `threshold`.

    A shingle is a run of `shingle` words or characters (`dsv3.data.shingles`). Pairs are looked for with `num_perm`
    hash functions, drawn from `seed`.
    """

    unit: Unit
    shingle: int
    num_perm: int
    threshold: float
    seed: int

    def validate(self) -> None:
        require(self.shingle > 0, f"shingle is {self.shingle}; expected a positive number")
        require(self.num_perm >= 16, f"num_perm is {self.num_perm}; expected at least 16 (128 is usual)")
        require(0.1 <= self.threshold <= 1, f"threshold is {self.threshold}; expected between 0.1 and 1")
        require(0 <= self.seed < 2**32, f"seed is {self.seed}; expected 0 to 2**32 - 1")


class Sketch(NamedTuple):
    """What is compared instead of a text.

    shingles   sorted unique uint32
    minima     uint32 [num_perm]: the least value of each hash function on the shingles
    """

    shingles: np.ndarray
    minima: np.ndarray


def digest(text: str) -> bytes:
    """sha256 of the UTF-8 text; half surrogate pairs, which are not UTF-8, are hashed as if they were."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def sketch(text: str, config: NearConfig) -> Sketch:
    """MinHash (Broder 1997): two sets share each of `minima` with a probability that is their Jaccard index.

    The hash functions are a x + b modulo 2**32 with odd a, on shingles that are well-mixed hashes already.
    """
    found = shingles(text, config.unit, config.shingle)
    rng = np.random.default_rng(config.seed)
    factors, offsets = rng.integers(0, 2**32, (2, config.num_perm, 1), np.uint32)
    minima = np.full(config.num_perm, 2**32 - 1, np.uint32)
    for start in range(0, len(found), SHINGLES_A_STEP):
        hashed = (factors | np.uint32(1)) * found[start:start + SHINGLES_A_STEP]
        hashed += offsets
        minima = np.minimum(minima, hashed.min(axis=1))
    return Sketch(found, minima)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|intersection| / |union| of two sets given as sorted unique arrays, not both empty."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


class NearIndex:
    """Sketches of the documents kept so far. A similar one is found by LSH, then verified on the shingles themselves.

    So nothing is ever taken for a near duplicate whose Jaccard index is below the threshold (as far as 32-bit hashes of
    shingles differ), and one above it may be missed. Shingles wait in an unnamed temporary file in `scratch`, which
    vanishes with the process; memory holds `num_perm` hashes a document, in the LSH tables of datasketch.
    """

    def __init__(self, config: NearConfig, scratch: Path | None = None):
        try:
            from datasketch import LeanMinHash, MinHashLSH
        except ImportError as error:
            raise UserError("near duplicates need datasketch, which is not installed; install dsv3[data], or look for "
                            "exact duplicates only") from error
        self._threshold = config.threshold
        settings = {"threshold": config.threshold, "num_perm": config.num_perm}
        try:
            self._lsh = MinHashLSH(**settings, weights=LSH_WEIGHTS)
        except ValueError:  # a high threshold asks for one band of hashes; datasketch takes no fewer than two
            self._lsh = MinHashLSH(**settings, params=(2, config.num_perm // 2))
        self._minhash = lambda minima: LeanMinHash(seed=config.seed, hashvalues=minima, scheme="affine32")
        self._file = tempfile.TemporaryFile(dir=scratch, buffering=0)
        self._spans: list[tuple[int, int]] = []  # of each kept document: first shingle in the file, their number

    def similar(self, candidate: Sketch) -> int | None:
        """The number of the first document added that is a near duplicate; None if there is none."""
        if len(candidate.shingles) == 0:
            return None
        for key in sorted(self._lsh.query(self._minhash(candidate.minima))):
            start, count = self._spans[key]
            sizes = sorted((count, len(candidate.shingles)))
            if sizes[0] >= self._threshold * sizes[1]:  # else too unequal in size to be so similar
                self._file.seek(4 * start)
                if jaccard(candidate.shingles, np.fromfile(self._file, np.uint32, count)) >= self._threshold:
                    return key
        return None

    def add(self, kept: Sketch) -> int:
        """Add a document, also one without shingles; returns its number, counted from 0."""
        number, start = len(self._spans), sum(self._spans[-1]) if self._spans else 0
        self._spans.append((start, len(kept.shingles)))
        if len(kept.shingles):
            self._file.seek(4 * start)
            kept.shingles.tofile(self._file)
            self._lsh.insert(number, self._minhash(kept.minima), check_duplication=False)
        return number

    def close(self) -> None:
        self._file.close()


class Deduplicator:
    """Documents one after the other, each compared with those kept before it: what comes later changes nothing.

    `near=None` looks for exact duplicates only. A near duplicate is compared with kept documents alone, not with
    dropped ones, so that no chain of small differences ends in dropping something dissimilar, and a second pass over
    what was kept drops nothing.
    """

    def __init__(self, near: NearConfig | None, scratch: Path | None = None):
        self._names: list[str] = []
        self._exact: dict[bytes, int] = {}
        self._near = None if near is None else NearIndex(near, scratch)

    def duplicate_of(self, name: str, text_digest: bytes, drawn: Sketch | None) -> tuple[str, str] | None:
        """("exact" or "near", name of the kept document) for a duplicate; None for another, which is kept from now."""
        if text_digest in self._exact:
            return "exact", self._names[self._exact[text_digest]]
        if self._near is not None:
            found = self._near.similar(drawn)
            if found is not None:
                return "near", self._names[found]
            self._near.add(drawn)
        self._exact[text_digest] = len(self._names)
        self._names.append(name)
        return None

    def close(self) -> None:
        if self._near is not None:
            self._near.close()


def deduplicate(documents: Iterable[Document], near: NearConfig | None) -> Iterator[Document]:
    """The documents that are no duplicates of earlier ones, in this process; `dsv3.data.clean` uses several."""
    seen = Deduplicator(near)
    try:
        for document in documents:
            drawn = None if near is None else sketch(document.text, near)
            if seen.duplicate_of(document.name, digest(document.text), drawn) is None:
                yield document
    finally:
        seen.close()
