"""Corpus: what is read, how it is divided, and what is refused."""

import logging

import pytest

from dsv3.config import DataConfig, UserError
from dsv3.data.corpus import Document, corpus_hash, read_corpus, split


def config(path, pattern="*.txt"):
    return DataConfig(path=path, pattern=pattern, validation_fraction=0.1, tokenizer="bytes", bpe_vocab_size=300,
                      fim_rate=0.0, segment_ids=False, eval_bytes=100, eval_stride=8, seed=0)


def test_reads_matching_files_at_any_depth_sorted_and_unchanged(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "deep.txt").write_bytes("line\r\nä\n".encode())
    (tmp_path / "a.txt").write_bytes(b"first")
    (tmp_path / "c.txt").write_bytes(b"last")
    (tmp_path / "other.md").write_bytes(b"not matched")
    assert read_corpus(config(str(tmp_path))) == [("a.txt", "first"), ("b/deep.txt", "line\r\nä\n"), ("c.txt", "last")]
    assert read_corpus(config(str(tmp_path / "other.md"))) == [("other.md", "not matched")]


def test_empty_files_are_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("")
    with caplog.at_level(logging.INFO):
        assert [document.name for document in read_corpus(config(str(tmp_path)))] == ["a.txt"]
    assert "left out 1 empty" in caplog.text


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.*does not exist"):
        read_corpus(config(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"no file matches data.pattern '\*.txt'"):
        read_corpus(config(str(tmp_path)))
    with pytest.raises(UserError, match="not a relative glob"):
        read_corpus(config(str(tmp_path), "/etc/*"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="all 1 files .* are empty"):
        read_corpus(config(str(tmp_path)))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*latin.txt.*UTF-8"):
        read_corpus(config(str(tmp_path)))


def test_standard_library_without_tests_and_packages():
    documents = read_corpus(config(None, "json/*.py")) + read_corpus(config(None, "__init__.py"))
    names = [document.name for document in documents]
    assert "json/decoder.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert "class JSONDecoder" in documents[names.index("json/decoder.py")].text


def test_hash_sees_names_texts_and_order():
    one, two = Document("a", "bc"), Document("d", "e")
    variants = [[one, two], [two, one], [one], [Document("ab", "c"), two], [Document("a", "b"), Document("cd", "e")]]
    assert len({corpus_hash(documents) for documents in variants}) == len(variants)


def test_a_side_depends_on_the_text_alone():
    documents = [Document(f"{i}.txt", f"text {i}") for i in range(2000)]
    train, validation = split(documents, 0.05)
    assert sorted(train + validation) == sorted(documents)
    assert 60 <= len(validation) <= 140  # 100 expected, four standard deviations of 9.7
    fewer_train, fewer_validation = split(documents[::2], 0.05)
    assert set(fewer_train) <= set(train) and set(fewer_validation) <= set(validation)
    copies = [document._replace(name="copy of " + document.name) for document in documents]
    assert {text for _, text in split(copies + documents, 0.05)[1]} == {text for _, text in validation}
    assert set(validation) <= set(split(documents, 0.2)[1])


def test_an_empty_side_is_refused():
    documents = [Document("a", "first"), Document("b", "second")]
    with pytest.raises(UserError, match="leaves no validation document of 2"):
        split(documents, 1e-9)
    with pytest.raises(UserError, match="leaves no training document of 2"):
        split(documents, 1 - 1e-9)
