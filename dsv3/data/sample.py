"""A few documents of many, the same ones whatever the order in which all are seen."""

import heapq
from typing import NamedTuple

from dsv3.data.corpus import Document


class _Entry(NamedTuple):
    """Ordered so that a heap's first entry has the largest digest, and of identical texts the one that came last."""

    key: tuple[int, int]
    size: int
    document: Document


class HashSample:
    """The documents with the smallest digests whose sizes add up to at least `limit`, and no more than needed.

    Memory is that of the sample: a document that later ones make superfluous is forgotten.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._total, self._seen = limit, 0, 0
        self._heap: list[_Entry] = []

    def add(self, digest: bytes, size: int, document: Document) -> None:
        key = (-int.from_bytes(digest, "big"), -self._seen)
        self._seen += 1
        heapq.heappush(self._heap, _Entry(key, size, document))
        self._total += size
        while self._total - self._heap[0].size >= self._limit:
            self._total -= heapq.heappop(self._heap).size

    def documents(self) -> list[Document]:
        """In the order of their digests."""
        return [entry.document for entry in sorted(self._heap, reverse=True)]
