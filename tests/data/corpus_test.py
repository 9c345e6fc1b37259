"""Corpus: what is read, in which order, how it is divided, and what is refused."""

import gzip
import json
import logging
import sys

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest

from dsv3.config import UserError
from dsv3.data.corpus import find_files, held_out, read_documents, text_digest


def read(*files, text_field="text"):
    return list(read_documents(tuple(map(str, files)), text_field))


def refused(*files, text_field="text"):
    """The one line of the `UserError`."""
    with pytest.raises(UserError) as error:
        read(*files, text_field=text_field)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_jsonl(path, texts, opened=open):
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def write_parquet(path, texts, column="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), column: texts}), path, row_group_size=3)


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "deep.txt").write_bytes("line\r\nä\n".encode())
    (tmp_path / "a.txt").write_bytes(b"first")
    (tmp_path / "c.md").write_bytes(b"last")
    (tmp_path / "code.c").write_bytes(b"int x;")
    return tmp_path


def test_a_directory_is_read_at_any_depth_sorted_and_unchanged(tree):
    root = tree.as_posix()
    assert read(tree) == [(f"{root}/a.txt", "first"), (f"{root}/b/deep.txt", "line\r\nä\n"), (f"{root}/c.md", "last")]


def test_globs_and_named_files_take_any_suffix(tree):
    assert [text for _, text in read(tree / "**" / "*.txt")] == ["first", "line\r\nä\n"]
    assert [text for _, text in read(tree / "*.[ch]")] == ["int x;"]
    assert [text for _, text in read(tree / "code.c")] == ["int x;"]
    assert len(read(tree / "**")) == 4  # directories that match are not files


def test_entries_that_overlap_give_each_file_once_in_one_order(tree):
    everything = read(tree, tree / "*.c")
    assert read(tree / "code.c", tree / "a.txt", tree / "**" / "*.*", tree) == everything
    assert [name for name, _ in everything] == sorted(name for name, _ in everything)


def test_the_home_directory(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    assert [text for _, text in read("~/a.txt", "~/*.md")] == ["first", "last"]


@hypothesis.settings(deadline=None, max_examples=30,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.text(min_size=1), min_size=1, max_size=8))
def test_all_record_formats_hold_the_same_texts(tmp_path, texts):
    write_jsonl(tmp_path / "x.jsonl", texts)
    write_jsonl(tmp_path / "x.jsonl.gz", texts, gzip.open)
    write_parquet(tmp_path / "x.parquet", texts)
    for suffix in ("jsonl", "jsonl.gz", "parquet"):
        path = tmp_path / f"x.{suffix}"
        assert read(path) == [(f"{path.as_posix()}:{i}", text) for i, text in enumerate(texts, 1)]


def test_records_are_counted_with_empty_ones_and_blank_lines(tmp_path, caplog):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\n{"text": ""}\r\n  \n{"text": "b"}')
    with caplog.at_level(logging.INFO):
        assert [(name.rsplit(":")[-1], text) for name, text in read(tmp_path)] == [("1", "a"), ("5", "b")]
    assert "read 2 documents" in caplog.text and "left out 1 empty" in caplog.text


def test_reading_streams(tmp_path):
    """The first documents come before a bad record far behind them is seen."""
    with (tmp_path / "x.jsonl").open("w") as file:
        file.writelines('{"text": "good"}\n' for _ in range(5000))
        file.write("bad\n")
    documents = read_documents((str(tmp_path),), "text")
    assert next(documents).text == "good"
    with pytest.raises(UserError, match="record 5001 of .*x.jsonl"):
        list(documents)


def test_another_field(tmp_path):
    write_parquet(tmp_path / "x.parquet", ["a"], column="content")
    (tmp_path / "y.jsonl").write_text('{"content": "b", "text": 3}')
    assert [text for _, text in read(tmp_path, text_field="content")] == ["a", "b"]


def test_python_source_is_read_in_the_encoding_it_declares(tmp_path):
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\n# café\n".encode("latin-1"))
    (tmp_path / "plain.py").write_bytes("# café\n".encode())
    assert [text.split()[-1] for _, text in read(tmp_path)] == ["café", "café"]


def test_files_that_are_not_there(tree):
    assert "/nowhere' does not exist" in refused("/nowhere")
    assert "no file matches" in refused(tree / "*.rst")
    assert "no file matches" in refused(tree / "a.txt", tree / "nowhere" / "*.txt")  # each entry has to give something
    (tree / "b" / "deep.txt").unlink()
    assert "holds no file that ends in .txt" in refused(tree / "b")


@pytest.mark.parametrize("name, content, said", [
    ("x.txt", "caf\xe9".encode("latin-1"), "cannot read '{}' ("),
    ("x.py", b"# coding: nonsense\n", "cannot read '{}' ("),
    ("x.py", b"# coding: rot13\n", "cannot read '{}' ("),
    ("x.jsonl", b'{"text": "a"}\n{"text": \n', "record 2 of '{}' is not a line of JSON"),
    ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "record 2 of '{}' is not a line of JSON"),
    ("x.jsonl", b"[" * 100_000, "record 1 of '{}' is not a line of JSON"),
    ("x.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "record 2 of '{}' has no field 'text'"),
    ("x.jsonl", b'"text"', "record 1 of '{}' has no field 'text'"),
    ("x.jsonl", b'{"text": "a"}\n{"text": 7}\n', "record 2 of '{}': field 'text' is 7, not a text"),
    ("x.jsonl", b'{"text": null}\n', "record 1 of '{}': field 'text' is None, not a text"),
    ("x.jsonl", b'{"text": "a\\ud800"}\n', "record 1 of '{}' holds half of a surrogate pair"),
    ("x.jsonl.gz", b"plain", "cannot read '{}'"),
    ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:-20], "cannot read '{}' after record 9"),
    ("x.parquet", b"PAR1 not", "'{}' is not a readable Parquet file"),
])
def test_content_that_cannot_be_read_names_file_and_record(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert said.format(tmp_path / name) in refused(tmp_path)


def test_tables_that_cannot_be_read_name_column_and_row(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    write_parquet(path, ["a", None], column="content")
    assert "has no column 'text'; set text_field of its source to one of: id, content" in refused(path)
    assert f"record 2 of '{path}': field 'content' is None" in refused(path, text_field="content")
    assert "record 1 of" in refused(path, text_field="id")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'dsv3[data]'" in refused(path)


def test_standard_library_without_tests_and_packages():
    names = [name for name, _ in find_files(None)]
    assert names == sorted(names) and "json/decoder.py" in names and all(name.endswith(".py") for name in names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    documents = read_documents(None, "text")
    assert next(documents).name == names[0]


def test_a_side_depends_on_the_text_alone():
    texts = [f"text {i}" for i in range(2000)]
    out = {text for text in texts if held_out(text_digest(text), 0.05)}
    assert 60 <= len(out) <= 140  # 100 expected, four standard deviations of 9.7
    assert out < {text for text in texts if held_out(text_digest(text), 0.2)}


def test_the_ends_of_the_fractions():
    assert held_out(b"\0" * 32, 1e-9) and not held_out(b"\xff" * 32, 0.999)
    assert held_out(b"\x7f" + b"\xff" * 31, 0.5) and not held_out(b"\x80" + b"\0" * 31, 0.5)
