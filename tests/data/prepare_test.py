"""Preparation: complete, repeatable, streamed, verified, all or nothing."""

import collections
import dataclasses
import json
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tqdm import tqdm

from dsv3.config import DataConfig, SourceConfig, UserError
from dsv3.data import build as build_module
from dsv3.data import digests as digests_module
from dsv3.data import prepare as prepare_module
from dsv3.data.corpus import held_out, read_documents, text_digest
from dsv3.data.fim import assemble, document_parts
from dsv3.data.packing import pack
from dsv3.data.prepare import prepare
from dsv3.data.split_tokens import find_splits, split_tokens

SEQ_LEN = 32
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def source(*files, text_field="text", weight=1.0):
    return SourceConfig(files=tuple(map(str, files)), text_field=text_field, weight=weight)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """120 files of code, and 80 records of prose."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(120):
        (root / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i * i} # äöü\n" * (1 + i % 7), "utf-8")
    with (root / "prose.jsonl").open("w") as file:
        file.writelines(json.dumps({"body": f"Line {i}.\nNo. {i % 9}, and so on.\n" * (1 + i % 3)}) + "\n"
                        for i in range(80))
    return DataConfig(
        sources=(source(root / "*.txt"), source(root / "prose.jsonl", text_field="body", weight=3.0)),
        validation_fraction=0.2, tokenizer="bpe", bpe_vocab_size=350, split_rate=0.3, fim_rate=0.3, segment_ids=False,
        eval_bytes=1000, eval_stride=8, seed=0)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "prepared"
    prepare(config, SEQ_LEN, directory)
    return directory


@pytest.fixture
def directory(finished, tmp_path):
    """A finished preparation that a test may damage."""
    return shutil.copytree(finished, tmp_path / "prepared")


def sides(config, number):
    """(training, held-out) texts of one source."""
    chosen = config.sources[number]
    texts = [text for _, text in read_documents(chosen.files, chosen.text_field)]
    out = [held_out(text_digest(text), config.validation_fraction) for text in texts]
    return [text for text, o in zip(texts, out) if not o], [text for text, o in zip(texts, out) if o]


def documents_in(shards):
    """The tokens of every segment of every row."""
    for shard in shards:
        for tokens, segments in zip(shard.tokens_RL, shard.segment_ids_RL):
            yield from (tokens[segments == s] for s in range(1, segments.max() + 1))


def test_rows_of_a_source_hold_its_training_documents_and_nothing_else(config, finished):
    plain = dataclasses.replace(config, fim_rate=0.0)
    prepared = prepare(plain, 2000, finished.with_name("plain"))  # rows long enough that no document is cut
    for number, shards in enumerate(prepared.sources):
        texts = [prepared.tokenizer.decode(tokens) for tokens in documents_in(shards)]
        train, _ = sides(config, number)
        assert collections.Counter(texts) == collections.Counter(BOS + text + EOS for text in train)


def test_rows_are_what_its_parts_make_of_the_documents(config, finished):
    """Every stage by itself, for the whole of each source at once: nothing depends on batches or threads."""
    prepared = prepare(config, SEQ_LEN, finished)
    tokenizer, splits = prepared.tokenizer, find_splits(prepared.tokenizer)
    for number, (shard,) in enumerate(prepared.sources):
        documents = []
        for text in sides(config, number)[0]:
            parts = document_parts(text, config.fim_rate, config.seed)
            tokens = assemble(tokenizer, [tokenizer.encode(part) for part in parts])
            documents.append(split_tokens(splits, tokens, config.split_rate, config.seed, text_digest(text)))
        for expected, found in zip(pack(documents, SEQ_LEN + 1), shard):
            np.testing.assert_array_equal(found, expected)


def test_some_tokens_are_split_in_training_and_none_in_validation(config, finished, tmp_path):
    whole = prepare(dataclasses.replace(config, split_rate=0.0), SEQ_LEN, tmp_path / "whole")
    split = prepare(config, SEQ_LEN, finished)
    assert split.tokenizer == whole.tokenizer
    assert split.manifest["train"]["tokens"] > whole.manifest["train"]["tokens"]
    assert split.manifest["validation"] == whole.manifest["validation"]
    for (one, _), (other, _) in zip(split.validation_documents, whole.validation_documents, strict=True):
        np.testing.assert_array_equal(one, other)


def test_manifest_counts_what_is_there(config, finished):
    prepared = prepare(config, SEQ_LEN, finished)
    manifest = prepared.manifest
    for number, (shards, facts) in enumerate(zip(prepared.sources, manifest["sources"], strict=True)):
        train, out = sides(config, number)
        counted = facts["train"]
        (shard,) = shards
        assert shard.tokens_RL.shape == shard.segment_ids_RL.shape == (counted["rows"], SEQ_LEN + 1)
        assert shard.tokens_RL.dtype == np.uint16 and isinstance(shard.tokens_RL, np.memmap)
        real = shard.segment_ids_RL > 0
        assert counted["tokens"] == np.count_nonzero(real)
        assert np.isclose(counted["padding_share"], np.mean(~real))
        assert counted["documents"] == len(train) == np.count_nonzero(
            shard.tokens_RL[real] == prepared.tokenizer.bos_id)
        assert counted["fim_documents"] == np.count_nonzero(shard.tokens_RL == prepared.tokenizer.fim_hole_id) > 0
        assert counted["bytes"] == sum(len(text.encode()) for text in train)
        assert facts["held_out"] == {"documents": len(out), "bytes": sum(len(text.encode()) for text in out)}
    for name in ("documents", "fim_documents", "bytes", "tokens", "rows"):
        assert manifest["train"][name] == sum(facts["train"][name] for facts in manifest["sources"])
    assert manifest["held_out"]["documents"] == sum(facts["held_out"]["documents"] for facts in manifest["sources"])
    assert prepared.tokenizer.vocab_size == manifest["vocab_size"] == 350
    assert manifest["python"] is None


def test_validation_is_held_out_text_of_all_sources_of_the_asked_size(config, finished):
    prepared = prepare(config, SEQ_LEN, finished)
    held = sorted((text for number in range(2) for text in sides(config, number)[1]), key=text_digest)
    assert 1000 - 16 <= len(prepared.validation_text) <= 1000  # each cut may drop one incomplete character
    assert sum(n_bytes for _, n_bytes in prepared.validation_documents) == len(prepared.validation_text)
    texts = [prepared.tokenizer.decode(tokens) for tokens, _ in prepared.validation_documents]
    assert all((BOS + full + EOS).startswith(text) for full, text in zip(held, texts))  # in the order of the hash
    assert any("def" in text for text in texts) and any("Line" in text for text in texts)
    for full, text in zip(held, texts):
        assert text.endswith(EOS) == (text == BOS + full + EOS)  # a cut document has no end to predict
    assert max(n_bytes for _, n_bytes in prepared.validation_documents) <= 1000 // 8
    assert "".join(texts).replace(EOS, "").replace(BOS, "").encode() == prepared.validation_text


def test_few_held_out_documents_share_the_bytes(config, tmp_path):
    few = dataclasses.replace(config, eval_bytes=10**6)  # more than there is: everything is scored
    prepared = prepare(few, SEQ_LEN, tmp_path / "prepared")
    held = sorted((text for number in range(2) for text in sides(config, number)[1]), key=text_digest)
    assert prepared.validation_text == "".join(held).encode()


def test_a_second_build_is_identical_and_a_load_does_not_build(config, finished, monkeypatch):
    again = prepare(config, SEQ_LEN, finished.with_name("again"))
    monkeypatch.setattr(prepare_module, "_build", None)
    assert again.manifest == prepare(config, SEQ_LEN, finished).manifest  # with the sha256 of every file


def test_the_weight_of_a_source_changes_no_file(config, finished):
    other = dataclasses.replace(config, sources=(dataclasses.replace(config.sources[0], weight=9.0), config.sources[1]))
    prepare(other, SEQ_LEN, finished)


def test_several_groups_are_several_shards_with_every_document_once(config, finished, monkeypatch, tmp_path):
    plain = dataclasses.replace(config, fim_rate=0.0, split_rate=0.0)
    whole = prepare(plain, 2000, tmp_path / "whole")
    monkeypatch.setattr(build_module, "GROUP_TOKENS", 500)
    monkeypatch.setattr(build_module, "BATCH_BYTES", 300)
    parts = prepare(plain, 2000, tmp_path / "parts")
    for one, many, facts in zip(whole.sources, parts.sources, parts.manifest["sources"]):
        assert len(one) == 1 and len(many) == facts["shards"] > 3
        count = lambda shards: collections.Counter(tokens.tobytes() for tokens in documents_in(shards))
        assert count(one) == count(many)
        lengths = [sum(map(len, documents_in([shard]))) for shard in many]
        assert all(length >= 500 for length in lengths[:-1])
    assert len(list(parts.shards())) == sum(map(len, parts.sources))
    assert parts.manifest["train"]["tokens"] == whole.manifest["train"]["tokens"]


def test_memory_does_not_grow_with_the_corpus(config, monkeypatch, tmp_path):
    """Ten times the text adds a fraction of its tokens to the peak (of Python and NumPy, with small groups)."""
    monkeypatch.setattr(build_module, "GROUP_TOKENS", 2**15)
    monkeypatch.setattr(build_module, "BATCH_BYTES", 2**13)
    peaks = []
    for copies in (150, 1500):
        with (tmp_path / f"{copies}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": f"{i} words and more\n" * 50}) + "\n" for i in range(copies))
        changed = dataclasses.replace(config, tokenizer="bytes", sources=(source(tmp_path / f"{copies}.jsonl"),))
        tracemalloc.start()
        tokens = prepare(changed, 127, tmp_path / str(copies)).manifest["train"]["tokens"]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 4 * tokens / 3  # 0.8 MB of 4.6 MB where it was written


def test_another_configuration_is_named(config, directory):
    with pytest.raises(UserError, match=r"data.fim_rate: 0.3 != 0.5"):
        prepare(dataclasses.replace(config, fim_rate=0.5), SEQ_LEN, directory)
    with pytest.raises(UserError, match=r"train.seq_len: 32 != 64"):
        prepare(config, 64, directory)
    other = (config.sources[0], dataclasses.replace(config.sources[1], text_field="text"))
    with pytest.raises(UserError, match=r"data.sources.1.text_field: 'body' != 'text'"):
        prepare(dataclasses.replace(config, sources=other), SEQ_LEN, directory)
    prepare(dataclasses.replace(config, segment_ids=True, eval_stride=4), SEQ_LEN, directory)  # read only later


@pytest.mark.parametrize("name", ["source_0/tokens_00000.npy", "source_1/segment_ids_00000.npy", "tokenizer.json",
                                  "validation.json"])
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
    assert (directory / "source_0" / "tokens_00000.npy").exists()


def test_a_flipped_bit_of_the_manifest_is_found_or_changes_nothing(config, directory):
    """Also where no file disagrees with it: in counts, in settings, in the seal and its name."""
    path = directory / "manifest.json"
    original, expected = path.read_bytes(), prepare(config, SEQ_LEN, directory).manifest
    rng, found = np.random.default_rng(0), 0
    for position in rng.choice(len(original), 300, replace=False):
        for bit in range(8):
            content = bytearray(original)
            content[position] ^= 1 << bit
            path.write_bytes(content)
            try:
                assert prepare(config, SEQ_LEN, directory).manifest == expected
            except UserError as error:
                assert "manifest.json' is damaged" in str(error)
                found += 1
    assert found > 2000


def test_a_manifest_with_another_count_or_without_a_seal_is_damaged(config, directory):
    path = directory / "manifest.json"
    sealed = json.loads(path.read_text("utf-8"))
    changed = json.loads(path.read_text("utf-8"))
    changed["sources"][0]["train"]["tokens"] += 1
    unsealed = {name: value for name, value in sealed.items() if name != "sha256"}
    for content in (changed, unsealed, [], None, 1.5, "text"):
        path.write_text(json.dumps(content), "utf-8")
        with pytest.raises(UserError, match="manifest.json' is damaged"):
            prepare(config, SEQ_LEN, directory)
    path.write_text(json.dumps(dict(reversed(sealed.items())), indent=8), "utf-8")  # the same content, set otherwise
    assert prepare(config, SEQ_LEN, directory).manifest == unsealed


@pytest.mark.parametrize("module, victim", [
    (build_module, "pack"), (build_module, "assemble"), (build_module, "choose_validation"),
    (prepare_module, "file_digests")])
def test_a_build_that_dies_leaves_nothing_and_the_next_one_succeeds(config, tmp_path, monkeypatch, module, victim):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, victim, die)
        prepare(config, SEQ_LEN, tmp_path / "prepared")
    assert list(tmp_path.iterdir()) == []
    assert prepare(config, SEQ_LEN, tmp_path / "prepared").manifest["train"]["rows"] > 0


def test_two_builds_at_once_agree_on_one(config, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: prepare(config, SEQ_LEN, tmp_path / "prepared"), range(2))
    assert one.manifest == other.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


def test_bars_wait_ten_seconds_and_count_every_byte(config, tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            bars.append((options["desc"], options["delay"], self))

    for module in (build_module, digests_module):
        monkeypatch.setattr(module, "tqdm", Bar)
    prepared = prepare(config, SEQ_LEN, tmp_path / "prepared")
    assert [desc for desc, *_ in bars] == [
        "reading source 0", "reading source 1", "training the tokenizer", "tokenizing source 0", "tokenizing source 1",
        "hashing", "hashing"]
    assert {delay for _, delay, _ in bars} == {10}
    done = [bar.n for *_, bar in bars]
    sizes = [sum(facts[side]["bytes"] for side in ("train", "held_out")) for facts in prepared.manifest["sources"]]
    assert done[:2] == done[3:5] == [bar.total for *_, bar in bars[3:5]] == sizes
    on_disk = sum((tmp_path / "prepared" / name).stat().st_size for name in prepared.manifest["files"])
    assert done[5:] == [on_disk, on_disk] == [bar.total for *_, bar in bars[5:]]


def test_a_killed_build_is_in_the_way_of_nobody(config, tmp_path):
    (tmp_path / ".prepared.0.partial").mkdir()
    (tmp_path / "prepared").mkdir()  # an empty directory is as good as none
    prepare(config, SEQ_LEN, tmp_path / "prepared")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".prepared.0.partial", "prepared"]


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_a_side_or_a_source_without_documents_is_refused(config, tmp_path, tokenizer):
    change = lambda **fields: dataclasses.replace(config, tokenizer=tokenizer, **fields)
    with pytest.raises(UserError, match="0.999999999 leaves no training document of 120 in data.sources.0"):
        prepare(change(validation_fraction=1 - 1e-9), SEQ_LEN, tmp_path / "prepared")
    with pytest.raises(UserError, match="1e-09 leaves no validation document of 200"):
        prepare(change(validation_fraction=1e-9), SEQ_LEN, tmp_path / "prepared")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="data.sources.1 holds no text"):
        prepare(change(sources=(config.sources[0], source(tmp_path / "empty.txt"))), SEQ_LEN, tmp_path / "prepared")
    with pytest.raises(UserError, match="data.eval_bytes 1 does not hold one character"):
        (tmp_path / "wide.jsonl").write_text("".join(json.dumps({"text": "漢" * (i + 1)}) + "\n" for i in range(99)))
        prepare(change(sources=(source(tmp_path / "wide.jsonl"),), eval_bytes=1), SEQ_LEN, tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_a_missing_file_is_told_before_any_work(config, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "make_tokenizer", None)
    with pytest.raises(UserError, match="nowhere' does not exist"):
        prepare(dataclasses.replace(config, sources=(*config.sources, source("nowhere"))), SEQ_LEN, tmp_path / "p")


def test_the_tokenizers_sample_is_training_text_of_all_sources_in_digest_order(config, monkeypatch):
    monkeypatch.setattr(build_module, "BPE_SAMPLE_BYTES", 2000)
    seen = []
    monkeypatch.setattr(build_module, "train_bpe", lambda texts, size: seen.extend(texts))
    _, sizes = build_module.make_tokenizer(config)
    train = sorted((text for number in range(2) for text in sides(config, number)[0]), key=text_digest)
    assert seen == train[:len(seen)]
    assert sum(len(text.encode()) for text in seen[:-1]) < 2000 <= sum(len(text.encode()) for text in seen)
    assert sizes == [sum(len(text.encode()) for side in sides(config, number) for text in side) for number in range(2)]


def test_standard_library_module(tmp_path):
    """Real source packs tightly, and its Python version is kept."""
    from email import __file__ as package
    files = f"{package.rpartition('/')[0]}/*.py"
    config = DataConfig(
        sources=(source(files),), validation_fraction=0.2, tokenizer="bpe", bpe_vocab_size=1024, split_rate=0.0,
        fim_rate=0.1, segment_ids=False, eval_bytes=20_000, eval_stride=32, seed=0)
    prepared = prepare(config, 128, tmp_path / "prepared")
    assert prepared.manifest["train"]["bytes_per_token"] > 2.5
    assert prepared.manifest["train"]["padding_share"] < 0.02


def test_bytes_need_no_training(config, tmp_path):
    prepared = prepare(dataclasses.replace(config, tokenizer="bytes"), SEQ_LEN, tmp_path / "prepared")
    assert prepared.tokenizer.vocab_size == 261
    assert prepared.manifest["train"]["bytes_per_token"] < 1


def test_the_released_tokenizer_needs_wider_tokens(config, tmp_path):
    prepared = prepare(dataclasses.replace(config, tokenizer="deepseek_v3"), SEQ_LEN, tmp_path / "prepared")
    assert prepared.manifest["vocab_size"] == 128_815
    assert {shard.tokens_RL.dtype for shard in prepared.shards()} == {np.dtype(np.int32)}
    assert max(shard.tokens_RL.max() for shard in prepared.shards()) > 2**16
