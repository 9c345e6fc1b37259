"""Texts as sets of hashed n-grams, vectorised: what repetition and near duplicates are measured on."""

import re
import zlib
from typing import Literal

import numpy as np

# Scripts that put no spaces between words: each of their characters is a word of its own.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
# `\w` of ASCII, everything else a space: a hundred times faster than the regular expression.
ASCII_WORD = bytes(code if chr(code).isalnum() or chr(code) == "_" else 32 for code in range(128)) + bytes(128)
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: multiplying by it loses nothing

Unit = Literal["words", "characters"]


def words(text: str) -> list[bytes]:
    """Lower-case words in UTF-8: letters, digits and `_`, without punctuation; one character each in CJK and Thai."""
    lower = text.lower()
    if lower.isascii():
        return lower.encode().translate(ASCII_WORD).split()
    return [word.encode("utf-8", "surrogatepass") for word in WORD.findall(lower)]


def unit_ids(text: str, unit: Unit) -> np.ndarray:
    """uint32 [units]: the crc32 of each word, or each code point of the lower-case text with its spaces made one."""
    if unit == "words":
        found = words(text)
        return np.fromiter(map(zlib.crc32, found), np.uint32, len(found))
    return np.frombuffer(" ".join(text.lower().split()).encode("utf-32-le", "surrogatepass"), np.uint32)


def ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """uint32 [max(0, units - n + 1)]: one hash for each run of n units, in order."""
    count = max(0, len(ids) - n + 1)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total = total * MIX + ids[offset:offset + count]  # modulo 2**64
    total ^= total >> np.uint64(32)  # the high half has not yet reached the low one, nor the low one all of the high
    return (total * MIX >> np.uint64(32)).astype(np.uint32)


def shingles(text: str, unit: Unit, n: int) -> np.ndarray:
    """The set of the text's n-grams as sorted unique uint32; a shorter text is one n-gram, one without units none."""
    ids = unit_ids(text, unit)
    return np.unique(ngram_hashes(ids, min(n, len(ids)))) if len(ids) else np.zeros(0, np.uint32)
