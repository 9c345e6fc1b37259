"""FIM: parts recombine, PSM order, decisions that depend on seed and text alone."""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from dsv3.data.fim import assemble, document_parts, fim_split
from dsv3.data.tokenizer import byte_tokenizer


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(), st.integers(0, 2**32 - 1))
def test_parts_recombine(text, seed):
    prefix, middle, suffix = fim_split(text, np.random.default_rng(seed))
    assert prefix + middle + suffix == text


def test_cuts_are_uniform_over_all_places():
    rng, n = np.random.default_rng(0), 20_000
    counts = np.zeros(4)
    for _ in range(n):
        prefix, middle, _ = fim_split("abc", rng)
        counts[len(prefix)] += 1
        counts[len(prefix) + len(middle)] += 1
    np.testing.assert_allclose(counts / (2 * n), 0.25, atol=0.015)  # 0.25 ± 7 standard deviations of 0.002


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(), st.integers(-5, 5))
def test_assembled_tokens_read_back_in_psm_order(text, seed):
    tokenizer = byte_tokenizer()
    prefix, middle, suffix = parts = document_parts(text, 1.0, seed)
    tokens = assemble(tokenizer, tokenizer.encode_batch(parts))
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == (
        f"<｜begin▁of▁sentence｜><｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>{middle}<｜end▁of▁sentence｜>")


def test_plain_document_is_bos_text_eos():
    tokenizer = byte_tokenizer()
    assert assemble(tokenizer, [tokenizer.encode("ab")]).tolist() == [0, 5 + ord("a"), 5 + ord("b"), 1]
    assert document_parts("ab", 0.0, 0) == ("ab",)


def test_rate_and_dependence_on_seed_and_text_only():
    texts = [f"document number {i}" for i in range(5000)]
    chosen = {text: document_parts(text, 0.1, 3) for text in texts}
    share = np.mean([len(parts) == 3 for parts in chosen.values()])
    assert abs(share - 0.1) < 0.017  # four standard deviations
    for text in reversed(texts[::7]):
        assert document_parts(text, 0.1, 3) == chosen[text]
    assert [document_parts(text, 0.1, 4) for text in texts] != list(chosen.values())
    for text, parts in chosen.items():  # a higher rate adds documents and moves no cut
        assert len(parts) == 1 or document_parts(text, 0.5, 3) == parts
