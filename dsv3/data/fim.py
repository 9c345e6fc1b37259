"""Fill in the middle (report section 4.1): some documents are learnt as prefix, suffix, middle."""

import hashlib
from collections.abc import Sequence

import numpy as np

from dsv3.data.corpus import text_digest
from dsv3.data.tokenizer import Tokenizer


def fim_split(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """(prefix, middle, suffix) between two cuts, each uniform over the len(text) + 1 places around characters."""
    first, second = np.sort(rng.integers(0, len(text) + 1, size=2))
    return text[:first], text[first:second], text[second:]


def document_parts(text: str, rate: float, seed: int) -> tuple[str, ...]:
    """`(text,)`, or with probability `rate` its `fim_split`.

    Both draws depend only on `seed` and the text, so they survive any change of order or of the rest of the corpus.
    """
    digest = hashlib.sha256(f"{seed} ".encode() + text_digest(text)).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    return fim_split(text, rng) if rng.random() < rate else (text,)


def assemble(tokenizer: Tokenizer, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens of a document from those of its parts, int32.

    One part:                  bos text eos
    (prefix, middle, suffix):  bos <fim_begin> prefix <fim_hole> suffix <fim_end> middle eos   (PSM)

    The report prints neither bos; we give every document one, so that the first token of a document is always the same.
    """
    if len(parts) == 1:
        body = list(parts)
    else:
        prefix, middle, suffix = parts
        body = [[tokenizer.fim_begin_id], prefix, [tokenizer.fim_hole_id], suffix, [tokenizer.fim_end_id], middle]
    return np.concatenate([[tokenizer.bos_id], *body, [tokenizer.eos_id]]).astype(np.int32)
