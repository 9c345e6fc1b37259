"""An imported chat model answers on the command line as its template, its weights and its tokenizer say."""

import json
import subprocess
import sys

import pytest
from tiny_models import model_config, random_variables

from dsv3.data.tokenizer import BOS, EOS, byte_tokenizer
from dsv3.inference.chat import read_template, reply
from dsv3.interop.export import export, flatten
from dsv3.model.ops import reference_ops

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<｜fim▁begin｜>' if m.role == 'user' else m.role }}"
            "{{ m.content }}{% endfor %}")
TURNS = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hello"}]


def run(module, *arguments):
    process = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments], capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_an_imported_chat_model_answers(tmp_path):
    """Import, then one greedy answer, against the same weights in this process; without --system it is another."""
    tokenizer = byte_tokenizer()
    config, hf, workdir = model_config(vocab_size=tokenizer.vocab_size), tmp_path / "hf", tmp_path / "run"
    variables = random_variables(config)
    beside = {"tokenizer.json": tokenizer.to_json(),
              "tokenizer_config.json": json.dumps({"bos_token": BOS, "eos_token": EOS, "chat_template": TEMPLATE})}
    export(config, flatten(variables), hf, dtype="float32", base=dict(max_position_embeddings=64),
           files={name: text.encode() for name, text in beside.items()})
    run("convert", "import", f"--hf={hf}", f"--workdir={workdir}")
    arguments = ["--chat", f"--workdir={workdir}", "--prompt=Hello", "--temperature=0", "--max_new_tokens=16",
                 "--cache_length=64"]
    pieces = reply(config, reference_ops(row_block=8), variables, tokenizer, read_template(hf), TURNS, cache_length=64,
                   max_new_tokens=16)
    answer = run("generate", *arguments, "--system=Brief.")
    assert answer == "".join(pieces) + "\n" and len(answer) > 5
    assert run("generate", *arguments) != answer
