"""Preparation: complete, repeatable, verified, all or nothing."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dsv3.config import DataConfig, UserError
from dsv3.data import prepare as prepare_module
from dsv3.data.corpus import read_corpus, split
from dsv3.data.prepare import prepare

SEQ_LEN = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for i in range(120):
        (root / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i * i} # äöü\n" * (1 + i % 7), "utf-8")
    return DataConfig(path=str(root), pattern="*.txt", validation_fraction=0.2, tokenizer="bpe", bpe_vocab_size=350,
                      fim_rate=0.3, segment_ids=False, eval_bytes=1000, eval_stride=8, seed=0)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "prepared"
    prepare(config, SEQ_LEN, directory)
    return directory


@pytest.fixture
def directory(finished, tmp_path):
    """A finished preparation that a test may damage."""
    return shutil.copytree(finished, tmp_path / "prepared")


def test_rows_hold_the_training_documents_and_nothing_else(config, finished):
    plain = dataclasses.replace(config, fim_rate=0.0)
    prepared = prepare(plain, 2000, finished.with_name("plain"))  # rows long enough that no document is cut
    texts = []
    for tokens, segments in zip(prepared.tokens_RL, prepared.segment_ids_RL):
        texts += [prepared.tokenizer.decode(tokens[segments == s]) for s in range(1, segments.max() + 1)]
    train, _ = split(read_corpus(config), config.validation_fraction)
    assert sorted(texts) == sorted(f"<｜begin▁of▁sentence｜>{text}<｜end▁of▁sentence｜>" for _, text in train)


def test_manifest_counts_what_is_there(config, finished):
    prepared = prepare(config, SEQ_LEN, finished)
    manifest, train = prepared.manifest, prepared.manifest["train"]
    assert prepared.tokens_RL.shape == prepared.segment_ids_RL.shape == (train["rows"], SEQ_LEN + 1)
    assert prepared.tokens_RL.dtype == np.uint16 and isinstance(prepared.tokens_RL, np.memmap)
    real = prepared.segment_ids_RL > 0
    assert train["tokens"] == np.count_nonzero(real)
    assert np.isclose(train["padding_share"], np.mean(~real))
    assert train["documents"] == np.count_nonzero(prepared.tokens_RL[real] == prepared.tokenizer.bos_id)
    assert train["fim_documents"] == np.count_nonzero(prepared.tokens_RL == prepared.tokenizer.fim_hole_id) > 0
    assert train["documents"] + manifest["held_out"]["documents"] == 120
    assert prepared.tokenizer.vocab_size == manifest["vocab_size"] == 350
    assert manifest["python"] is None


def test_validation_is_held_out_text_of_the_asked_size(config, finished):
    prepared = prepare(config, SEQ_LEN, finished)
    train, held_out = split(read_corpus(config), config.validation_fraction)
    assert 1000 - 16 <= len(prepared.validation_text) <= 1000  # each cut may drop one incomplete character
    assert sum(n_bytes for _, n_bytes in prepared.validation_documents) == len(prepared.validation_text)
    texts = [prepared.tokenizer.decode(tokens[1:]) for tokens, _ in prepared.validation_documents]
    whole = {text + "<｜end▁of▁sentence｜>" for _, text in held_out}
    assert all(any(full.startswith(text) for full in whole) for text in texts)
    assert all(tokens[0] == prepared.tokenizer.bos_id for tokens, _ in prepared.validation_documents)
    for tokens, _ in prepared.validation_documents:
        text = prepared.tokenizer.decode(tokens[1:])
        assert (tokens[-1] == prepared.tokenizer.eos_id) == (text in whole)  # a cut document has no end to predict
    assert max(n_bytes for _, n_bytes in prepared.validation_documents) <= 1000 // 8
    assert "".join(texts).replace("<｜end▁of▁sentence｜>", "").encode() == prepared.validation_text


def test_a_second_build_is_identical_and_a_load_does_not_build(config, finished, monkeypatch):
    again = prepare(config, SEQ_LEN, finished.with_name("again"))
    monkeypatch.setattr(prepare_module, "_build", None)
    first = prepare(config, SEQ_LEN, finished)
    assert again.manifest == first.manifest  # with the sha256 of every file
    np.testing.assert_array_equal(again.tokens_RL, first.tokens_RL)


def test_another_configuration_is_named(config, directory):
    with pytest.raises(UserError, match=r"data.fim_rate: 0.3 != 0.5"):
        prepare(dataclasses.replace(config, fim_rate=0.5), SEQ_LEN, directory)
    with pytest.raises(UserError, match=r"train.seq_len: 32 != 64"):
        prepare(config, 64, directory)
    prepare(dataclasses.replace(config, segment_ids=True, eval_stride=4), SEQ_LEN, directory)  # read only later


@pytest.mark.parametrize("name", ["tokens.npy", "segment_ids.npy", "tokenizer.json", "validation.json"])
def test_a_damaged_or_missing_file_is_named(config, directory, name):
    content = bytearray((directory / name).read_bytes())
    content[-2] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*is damaged"):
        prepare(config, SEQ_LEN, directory)
    (directory / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*is damaged"):
        prepare(config, SEQ_LEN, directory)


def test_a_damaged_manifest_and_a_foreign_directory_are_refused(config, directory):
    (directory / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json.*is damaged"):
        prepare(config, SEQ_LEN, directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no prepared data"):
        prepare(config, SEQ_LEN, directory)
    assert (directory / "tokens.npy").exists()


@pytest.mark.parametrize("victim", ["pack", "corpus_hash", "_file_digest"])
def test_a_build_that_dies_leaves_nothing_and_the_next_one_succeeds(config, tmp_path, monkeypatch, victim):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, victim, die)
        prepare(config, SEQ_LEN, tmp_path / "prepared")
    assert list(tmp_path.iterdir()) == []
    assert prepare(config, SEQ_LEN, tmp_path / "prepared").manifest["train"]["rows"] > 0


def test_a_killed_build_is_in_the_way_of_nobody(config, tmp_path):
    (tmp_path / ".prepared.0.partial").mkdir()
    (tmp_path / "prepared").mkdir()  # an empty directory is as good as none
    prepare(config, SEQ_LEN, tmp_path / "prepared")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".prepared.0.partial", "prepared"]


def test_part_of_the_standard_library(tmp_path):
    config = DataConfig(path=None, pattern="email/*.py", validation_fraction=0.2, tokenizer="bpe", bpe_vocab_size=1024,
                        fim_rate=0.1, segment_ids=False, eval_bytes=20_000, eval_stride=32, seed=0)
    prepared = prepare(config, 128, tmp_path / "prepared")
    assert prepared.manifest["train"]["bytes_per_token"] > 2.5
    assert prepared.manifest["train"]["padding_share"] < 0.02
    assert json.loads((tmp_path / "prepared" / "manifest.json").read_text())["python"].startswith("3.")


def test_bytes_need_no_training(config, tmp_path):
    prepared = prepare(dataclasses.replace(config, tokenizer="bytes"), SEQ_LEN, tmp_path / "prepared")
    assert prepared.tokenizer.vocab_size == 261
    assert prepared.manifest["train"]["bytes_per_token"] < 1
