"""Split tokens: the same text, the asked share, the right tokens, and draws from seed and text alone."""

import inspect

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dsv3.data import packing
from dsv3.data.corpus import text_digest
from dsv3.data.split_tokens import find_splits, joins, split_tokens
from dsv3.data.tokenizer import byte_tokenizer, deepseek_v3_tokenizer, train_bpe

SOURCE = inspect.getsource(packing)
pieces_of_text = st.lists(st.sampled_from(["):\n        ", ".\n", " {\r\n\t", "。\n\n", "x", " = 1", "\n", "é", '",\n'])
                          | st.text(max_size=5)).map("".join)


@pytest.fixture(scope="module", params=["bpe", "deepseek_v3"])
def tokenizer(request):
    return deepseek_v3_tokenizer() if request.param == "deepseek_v3" else train_bpe([SOURCE * 3, "。\n\n" * 9], 800)


@pytest.fixture(scope="module")
def splits(tokenizer):
    return find_splits(tokenizer)


@pytest.mark.parametrize("text, expected", [
    ("):\n        ", ("):", "\n        ")), (" {\r\n", (" {", "\r\n")), (") \n\n", (") ", "\n\n")),
    ("。\n", ("。", "\n")), ("$\r", ("$", "\r")),
    ("\n\n    ", None), (" \n", None), ("):", None), ("a\n", None), (";1\n", None), ("", None)])
def test_what_joins_punctuation_and_a_line_break(text, expected):
    assert joins(text.encode()) == expected


def test_a_part_of_a_character_is_not_split():
    assert joins("。\n".encode()[1:]) is None
    assert joins(b".\n" + "。".encode()[:1]) is None


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(pieces_of_text, st.floats(0, 1), st.integers(0, 9))
def test_the_text_stays_the_same(tokenizer, splits, text, rate, seed):
    tokens = tokenizer.encode(text)
    result = split_tokens(splits, tokens, rate, seed, text_digest(text))
    assert result.dtype == np.int32 and len(result) >= len(tokens)
    assert tokenizer.decode(result) == text


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(pieces_of_text)
def test_splitting_all_is_encoding_the_parts(tokenizer, splits, text):
    """Against the definition, one token at a time."""
    tokens = tokenizer.encode(text)
    bytes_of = dict(tokenizer.pieces())
    expected = []
    for token in tokens.tolist():
        pair = joins(bytes_of[token])
        expected += [token] if pair is None else [id for part in pair for id in tokenizer.encode(part).tolist()]
    result = split_tokens(splits, tokens, 1.0, 0, text_digest(text))
    assert result.tolist() == expected
    np.testing.assert_array_equal(split_tokens(splits, tokens, 0.0, 0, text_digest(text)), tokens)


def test_the_share_and_what_it_depends_on(tokenizer, splits):
    text = "f(x):\n    g(y).\n" * 3000
    tokens = tokenizer.encode(text)
    candidates = np.count_nonzero(splits.length_V[tokens])
    assert candidates >= 3000
    split = lambda rate, seed, text: split_tokens(splits, tokens, rate, seed, text_digest(text))
    left = np.count_nonzero(splits.length_V[split(0.1, 0, text)])
    assert abs(left / candidates - 0.9) < 0.025  # four standard deviations of 0.0055
    np.testing.assert_array_equal(split(0.1, 0, text), split(0.1, 0, text))
    assert not np.array_equal(split(0.1, 0, text), split(0.1, 1, text))
    assert not np.array_equal(split(0.1, 0, text), split(0.1, 0, text + "another"))
    kept = lambda rate: np.count_nonzero(splits.length_V[split(rate, 0, text)])
    assert kept(0.1) > kept(0.2) > kept(0.6) > kept(1.0) == 0


def test_bytes_join_nothing():
    splits = find_splits(byte_tokenizer())
    assert not splits.length_V.any()
    tokens = byte_tokenizer().encode("a.\n")
    np.testing.assert_array_equal(split_tokens(splits, tokens, 1.0, 0, b""), tokens)


def test_the_released_tokenizer_has_hundreds():
    splits = find_splits(deepseek_v3_tokenizer())
    assert 700 < np.count_nonzero(splits.length_V) < 900
    assert set(splits.length_V) == {0, 2, 3}
