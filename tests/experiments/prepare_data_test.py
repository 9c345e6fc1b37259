"""The command as users meet it: real processes, real files, kills in the middle."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3.config import UserError
from dsv3.data import clean as clean_module
from dsv3.data.clean import REPORT, CleanConfig, clean
from dsv3.data.corpus import Document, read_documents
from dsv3.data.dedup import NearConfig
from dsv3.data.quality import Limits, parse_rules
from experiments.launch import MISTAKE

NEAR = NearConfig(unit="words", shingle=5, num_perm=64, threshold=0.8, seed=0)
CONFIG = CleanConfig(rules=parse_rules(["text"]), limits=Limits(), duplicates=True, near=NEAR)
PASS_ALL = CleanConfig(rules=(), limits=Limits(), duplicates=False, near=None)


def prose(number, words=80):
    return "\n".join(f"sentence {number} {index} says {number * 31 + index * 7}" for index in range(words // 5)) + "\n"


def write_corpus(directory, documents=40):
    """Files of every suffix; 6 to be dropped for sure: short, binary, blob, copy, near copy, record that is a copy."""
    directory.mkdir(parents=True)
    for number in range(documents):
        suffix = ("txt", "md", "rst", "py")[number % 4]
        (directory / f"text{number:03d}.{suffix}").write_text(prose(number))
    (directory / "x_short.txt").write_text("too short")
    (directory / "x_binary.txt").write_bytes(prose(900).encode() + b"\xff\xfe\0")
    (directory / "x_table.md").write_text(prose(901) + "0123456789 " * 300)
    (directory / "x_copy.rst").write_text(prose(3))
    (directory / "x_near.txt").write_text(prose(4, 400) + "the end")
    (directory / "w_near.txt").write_text(prose(4, 400))
    with gzip.open(directory / "z.jsonl.gz", "wt") as file:
        for number in (5, 200, 201):
            file.write(json.dumps({"body": "x", "text": prose(number)}) + "\n")
    return directory


def command(*arguments):
    return [sys.executable, "-m", "experiments.prepare_data", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


def hashes(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def check_counts(report):
    counts = dict(report["counts"])
    read = counts.pop("read")
    for unit in ("documents", "bytes"):
        assert read[unit] == sum(row[unit] for row in counts.values())
        assert counts["kept"][unit] == sum(file[unit] for file in report["files"].values())


@pytest.mark.slow
def test_a_corpus_is_cleaned_read_back_and_clean(tmp_path):
    corpus, output = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    process = run(f"--files={corpus}", f"--output={output}", "--workers=1")
    assert process.returncode == 0, process.stderr
    report = json.loads((output / "report.json").read_text())
    check_counts(report)
    dropped = {name: row["documents"] for name, row in report["counts"].items()
               if name not in ("read", "kept") and row["documents"]}
    assert dropped == {"undecodable": 1, "short": 1, "digits": 1, "exact_duplicate": 2, "near_duplicate": 1}
    assert report["counts"]["read"]["documents"] == 49
    names = {rule: [Path(name).name for name in examples[0]]
             for rule, examples in report["examples"].items() if examples}
    assert names["near_duplicate"] == ["x_near.txt", "w_near.txt"]
    assert names["exact_duplicate"] == ["x_copy.rst", "text003.py"] and names["undecodable"] == ["x_binary.txt"]
    assert "exact_duplicate" in process.stdout and "43" in process.stdout
    kept = list(read_documents((str(output),), "text"))
    assert [document.text for document in kept[:40]] == [prose(number) for number in range(40)]
    assert len(kept) == 43
    again = run(f"--files={output}", f"--output={tmp_path / 'again'}", "--workers=1")
    assert again.returncode == 0, again.stderr
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["counts"]["kept"] == report["counts"]["read"]
    assert [d.text for d in read_documents((str(tmp_path / "again"),), "text")] == [d.text for d in kept]


def test_the_number_of_processes_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(clean_module, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(clean_module, "SHARD_BYTES", 8_000)
    documents = [Document(f"d{number}", prose(number % 71, 80 + 5 * (number % 2))) for number in range(160)]
    for workers in (1, 2):
        report = clean(iter(documents), tmp_path / str(workers), CONFIG, workers)
        check_counts(report)
    monkeypatch.setattr(clean_module, "BATCH_DOCUMENTS", 50)
    clean(iter(documents), tmp_path / "3", CONFIG, 1)
    assert len(report["files"]) > 2 and report["counts"]["exact_duplicate"]["documents"] == 18
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2") == hashes(tmp_path / "3")
    assert {name: file["sha256"] for name, file in report["files"].items()} == {
        name: value for name, value in hashes(tmp_path / "1").items() if name != "report.json"}


def test_every_text_comes_back_as_it_was(tmp_path):
    texts = ["a\r\nb\u2028c\n", "\ufeffé中\U0001f600", "\0", '"\\', " ", "x" * 3_000_000, "a\r\nb\u2028c\n"]
    documents = [Document(f"d\udcff{number}", text) for number, text in enumerate(texts)]
    clean(documents, tmp_path / "out", PASS_ALL, 1)
    assert [document.text for document in read_documents((str(tmp_path / "out"),), "text")] == texts
    with gzip.open(tmp_path / "out" / "part-00000.jsonl.gz") as file:
        assert [json.loads(line)["name"] for line in file] == [document.name for document in documents]


def test_more_documents_than_memory_are_not_read_ahead(tmp_path, monkeypatch):
    """The reader is asked for a bounded number of documents beyond those decided."""
    monkeypatch.setattr(clean_module, "BATCH_DOCUMENTS", 2)
    real, decided, ahead = clean_module.Tally.add, [0], []

    def add(self, *arguments):
        decided[0] += 1
        real(self, *arguments)

    def documents():
        for number in range(200):
            ahead.append(number - decided[0])
            yield Document(f"d{number}", prose(number))

    monkeypatch.setattr(clean_module.Tally, "add", add)
    clean(documents(), tmp_path / "out", CONFIG, 1)
    assert max(ahead) <= 2 * 5 and decided == [200]


def children(pid):
    """The processes that `pid` has started, on Linux."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{pid}\n" in status.read_text():
                found.append(int(status.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


PAUSED = """
import sys, time
from pathlib import Path
from dsv3.config import UserError
from dsv3.data import clean
from dsv3.data.dedup import NearConfig
from dsv3.data.quality import Limits, parse_rules

NEAR = NearConfig(unit="words", shingle=5, num_perm=64, threshold=0.8, seed=0)
CONFIG = clean.CleanConfig(rules=parse_rules(["text"]), limits=Limits(), duplicates=True, near=NEAR)

def documents(go):
    for number in range(400):
        while number == 200 and not go.exists():
            time.sleep(0.02)
        yield clean.Document(f"d{number}", " ".join(f"spelling{number}x{index}" for index in range(60)))

if __name__ == "__main__":
    root = Path(sys.argv[1])
    clean.BATCH_DOCUMENTS, clean.SHARD_BYTES = 8, 8_000
    try:
        clean.clean(documents(root / "go"), root / "out" / "cleaned", CONFIG, 2)
    except UserError as error:
        sys.exit(f"error: {error}")
"""


@pytest.fixture
def paused(tmp_path):
    """A cleaning that has written two shards and waits, half of its input read, for a file named go."""
    (tmp_path / "script.py").write_text(PAUSED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    with open(tmp_path / "errors", "w") as errors:  # not a pipe, whose end orphans would hold
        process = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(tmp_path)], env=environment,
                                   stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
    spawned = []
    try:
        written = lambda: list(tmp_path.glob("out/.cleaned.*.partial/part-00001.jsonl.gz"))
        wait_until(lambda: process.poll() is not None or written())
        assert process.poll() is None, (tmp_path / "errors").read_text()
        spawned = children(process.pid)
        yield process, spawned
    finally:
        process.kill()
        process.wait()
        for pid in filter(alive, spawned):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_leaves_no_directory_and_no_process_and_the_next_one_succeeds(tmp_path, paused):
    process, spawned = paused
    assert len(spawned) >= 2 and all(map(alive, spawned))
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    left = os.listdir(tmp_path / "out")
    assert len(left) == 1 and left[0].startswith(".cleaned.") and left[0].endswith(".partial")
    assert REPORT not in os.listdir(tmp_path / "out" / left[0])
    wait_until(lambda: not any(map(alive, spawned)))
    report = clean([Document("a", prose(1))], tmp_path / "out" / "cleaned", CONFIG, 1)
    assert report["counts"]["kept"]["documents"] == 1
    assert sorted(os.listdir(tmp_path / "out" / "cleaned")) == ["part-00000.jsonl.gz", REPORT]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_is_one_line_and_leaves_nothing(tmp_path, paused):
    process, spawned = paused
    workers = [pid for pid in spawned if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    (tmp_path / "go").touch()
    process.wait(60)
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 1 and errors.startswith("error: a worker process was killed"), errors
    assert errors.count("\n") == 1
    assert os.listdir(tmp_path / "out") == []


def test_an_error_in_the_middle_leaves_nothing(tmp_path):
    def documents():
        yield Document("a", prose(1))
        raise UserError("record 2 is bad")

    with pytest.raises(UserError, match="record 2"):
        clean(documents(), tmp_path / "out", CONFIG, 1)
    assert os.listdir(tmp_path) == []


def test_nothing_kept_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no document is left.*short 1"):
        clean([Document("a", "b")], tmp_path / "out", CONFIG, 1)
    assert os.listdir(tmp_path) == []


def test_an_empty_directory_is_taken_and_a_full_one_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    clean([Document("a", prose(1))], tmp_path / "out", CONFIG, 1)
    before = hashes(tmp_path / "out")
    with pytest.raises(UserError, match="is not an empty directory"):
        clean([Document("b", prose(2))], tmp_path / "out", CONFIG, 1)
    assert hashes(tmp_path / "out") == before and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("arguments, words", [
    (["--files=setup.cfg", "--output=docs"], "'docs' exists and is not an empty directory"),
    (["--files=nowhere/*.txt", "--output={out}"], "no file matches"),
    (["--files=setup.cfg", "--output={out}", "--rules=shorts"], "rule 'shorts' does not exist"),
    (["--files=setup.cfg", "--output={out}", "--max_digit_share=2"], "max_digit_share is 2"),
    (["--files=setup.cfg", "--output={out}", "--threshold=0"], "threshold is 0"),
    (["--files=setup.cfg", "--output={out}", "--workers=0"], "workers is 0"),
    (["--files=setup.cfg", "--output={out}", "--config.train.steps=2"], "belongs to training"),
    (["--files=setup.cfg"], "output"),
    (["--files={out}.jsonl", "--output={out}"], "record 2"),
    (["--files={out}.txt", "--output={out}", "--rules=none"], "cannot read"),
])
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, arguments, words):
    (tmp_path / "out.jsonl").write_text(json.dumps({"text": prose(1)}) + "\n{broken\n")
    (tmp_path / "out.txt").write_bytes(b"\xff")
    before = sorted(os.listdir(tmp_path))
    process = run(*[argument.format(out=tmp_path / "out") for argument in arguments])
    assert process.returncode == MISTAKE
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
    assert words in process.stderr
    assert sorted(os.listdir(tmp_path)) == before
