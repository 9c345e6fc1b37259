"""The command line as users meet it: real processes, exit codes, one-line errors."""

import subprocess
import sys

import pytest
from small_runs import small_overrides, write_corpus

from dsv3.config import UserError
from experiments.launch import MISTAKE, load_config


def run(module, *arguments):
    """The finished process of `python -m experiments.MODULE ...`."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments], capture_output=True, text=True, timeout=240)


def flags(overrides):
    return [f"--config.{name}={value}" for name, value in overrides.items()]


@pytest.mark.slow
def test_train_continue_and_generate(tmp_path, monkeypatch):
    """The README's three commands in miniature, compiled as users' machines compile them."""
    monkeypatch.delenv("XLA_FLAGS")
    one_layer = {"model.n_layers": "1", "model.n_dense_layers": "0"}  # and an MTP module
    arguments = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}",
                 *flags(small_overrides(write_corpus(tmp_path / "text"), **one_layer))]
    first = run("pretrain", *arguments)
    assert first.returncode == 0, first.stderr
    assert "bits per byte" in first.stdout and "bigram" in first.stdout and "xz" in first.stdout
    again = run("pretrain", *arguments, "--config.train.keep_checkpoints=3")
    assert again.returncode == 0, again.stderr
    text = run("generate", f"--workdir={tmp_path / 'run'}", "--prompt=def alpha", "--max_new_tokens=12")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("def alpha") and len(text.stdout) > len("def alpha\n")
    long = run("generate", f"--workdir={tmp_path / 'run'}", f"--prompt={'x' * 40}")
    assert long.returncode == MISTAKE and one_line(long.stderr) and "cache" in long.stderr
    chat = ["generate", f"--workdir={tmp_path / 'run'}", "--prompt=alpha", "--system=Be brief.", "--max_new_tokens=12"]
    for arguments, reason in [([*chat, "--chat"], "no chat template"), (chat, "add --chat")]:
        refused = run(*arguments)
        assert refused.returncode == MISTAKE and one_line(refused.stderr) and reason in refused.stderr
    (tmp_path / "run" / "hf").mkdir()
    template = "{% for m in messages %}{{ '<｜fim▁hole｜>' + m.role + m.content }}{% endfor %}"
    (tmp_path / "run" / "hf" / "chat_template.jinja").write_text(template, "utf-8")
    answer = run(*chat, "--chat", "--temperature=0")
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout) > 1 and "alpha" not in answer.stdout[:5]


def one_line(stderr):
    return stderr.startswith("error: ") and stderr.count("\n") == 1


@pytest.mark.parametrize("module, arguments, words", [
    ("pretrain", ["--config=configs/tiny.py", "--workdir=unused", "--config.train.stepz=3"], "did you mean 'steps'"),
    ("pretrain", ["--config=configs/tiny.py", "--workdir=setup.cfg/run"], "--workdir"),
    ("generate", ["--workdir=nowhere"], "holds no checkpoint"),
    ("ablate", ["--config=configs/fp8.py", "--workdir=unused", "--only=fp8_block_gradient"],
     "did you mean 'fp8_block_gradients'"),
    ("ablate", ["--config=configs/tiny.py", "--workdir=unused"], "defines no VARIANTS"),
    ("generate", ["--workdr=runs/tiny"], "workdr"),
])
def test_a_mistake_is_one_line_and_an_exit_status_of_its_own(module, arguments, words):
    process = run(module, *arguments)
    assert process.returncode == MISTAKE
    assert one_line(process.stderr) and words in process.stderr, process.stderr
    assert "Traceback" not in process.stdout + process.stderr


@pytest.mark.parametrize("path, overrides, words", [
    ("configs/none.py", [], "is not a file"),
    ("setup.cfg", [], "is not a Python file"),
    ("dsv3/config/errors.py", [], "defines no get_config"),
    ("configs/tiny.py", ["model.dim=wide"], "wrong type"),
    ("configs/tiny.py", ["model.dim"], "has no value"),
    ("configs/tiny.py", ["model.moe.n_expert_groups=3"], "not divisible"),
    ("configs/tiny.py", ["model.moe.n_activated_experts=5"], "exceeds the 4 experts"),
])
def test_configs_that_cannot_be_loaded(path, overrides, words):
    with pytest.raises(UserError, match=words) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
