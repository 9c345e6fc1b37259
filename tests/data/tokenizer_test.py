"""Tokenizer: lossless, never a special token from text, streaming that never splits a character."""

import inspect

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from dsv3.config import UserError
from dsv3.data import tokenizer as tokenizer_module
from dsv3.data.tokenizer import SPECIALS, Tokenizer, byte_tokenizer, train_bpe

SOURCE = inspect.getsource(tokenizer_module)  # holds the literal names of all special tokens


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request):
    return train_bpe([SOURCE], 600) if request.param == "bpe" else byte_tokenizer()


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text())
@hypothesis.example("a\tb\r\n\n  \0é漢字🙂\u2028\ufeff")
@hypothesis.example("x" + SPECIALS[2] + "y<｜fim▁hol")
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.shape == (len(ids),)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.sampled_from([*SPECIALS, "<", "｜", "fim", " "])))
def test_text_never_becomes_a_special_token(tokenizer, words):
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim_hole_id, tokenizer.fim_begin_id, tokenizer.fim_end_id}
    assert special == set(range(5))
    assert not special & set(tokenizer.encode("".join(words)).tolist())
    assert not special & set(tokenizer.encode_batch(["".join(words)])[0].tolist())


def test_training_text_with_markers_makes_no_merge_of_them(tokenizer):
    assert not set(range(5)) & set(tokenizer.encode(SOURCE).tolist())
    assert tokenizer.decode([0, *tokenizer.encode("a"), 2]) == SPECIALS[0] + "a" + SPECIALS[2]


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
    assert backend.encode(SPECIALS[1]).ids == [1]


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
