"""Whole conversions, as a user makes them: killed and continued, corrupt, out and in again, trained on."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from hf_models import RAGGED, ROOT, rewrite, tensors
from processes import job
from small_runs import small_config, write_corpus

from dsv3.config import UserError, override, to_dict
from dsv3.data.tokenizer import BOS, FIM_HOLE, byte_tokenizer, released_tokenizer
from dsv3.interop import export as export_module
from dsv3.interop import import_run
from dsv3.interop.export_run import export_run
from dsv3.interop.import_run import import_checkpoint
from dsv3.interop.load import load
from dsv3.interop.safetensors import Reader
from dsv3.model.ops import reference_ops
from dsv3.train.loop import train
from experiments.benchmark_import import import_command, load_command, measured, v3_like, write_fp8
from experiments.launch import load_config
from experiments.runs import load_run

BESIDE = {
    "tokenizer.json": byte_tokenizer().to_json(), "tokenizer_config.json": '{"add_bos_token": true}',
    "generation_config.json": '{"temperature": 0.6}', "chat_template.jinja": "{{ messages }}",
    "tokenization_ours.py": "raise SystemExit('never run')", "additional_chat_templates/tools.jinja": "{{ tools }}"}


@pytest.fixture(scope="module")
def template():
    return load_config(str(ROOT / "configs/imported.py"), [])


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A released checkpoint in miniature, with what travels beside it, and what does not."""
    directory = tmp_path_factory.mktemp("fp8") / "hf"
    write_fp8(directory, RAGGED, seed=4, file_bytes=400_000)
    (directory / "additional_chat_templates").mkdir()
    for name, text in BESIDE.items():
        (directory / name).write_text(text)
    (directory / "README.md").write_text("# A model")
    return directory


@pytest.fixture(scope="module")
def imported(fp8, template, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imported") / "run"
    import_checkpoint(fp8, workdir, template)
    return workdir


def files(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_import_then_export_is_bit_identical_tensor_by_tensor(fp8, imported, tmp_path):
    export_run(imported, tmp_path / "hf")
    assert tensors(tmp_path / "hf") == tensors(fp8)
    assert not any(path.samefile(other) for path in (tmp_path / "hf").iterdir() for other in fp8.iterdir())
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads((fp8 / "config.json").read_text())


def test_the_run_holds_nothing_twice_and_no_rest_of_the_import(fp8, imported):
    assert sorted(path.name for path in imported.iterdir()) == ["checkpoints", "hf"]
    sizes = {name: info.stop - info.start for name, info in Reader(fp8).tensors.items()}
    copies = sum(sizes[f"model.layers.3.{name}.weight"] for name in ("embed_tokens", "shared_head.head"))
    assert sum(path.stat().st_size for path in imported.rglob("*.bin")) == sum(sizes.values()) - copies


def test_what_lies_beside_the_weights_travels_with_them(fp8, imported, tmp_path):
    export_run(imported, tmp_path / "hf")
    found = files(tmp_path / "hf")
    assert {name: found[name].decode() for name in BESIDE} == BESIDE
    assert "README.md" not in found


def test_an_imported_run_is_the_dequantised_model_with_its_tokenizer(fp8, imported):
    config, variables = load(fp8)
    run = load_run(imported)
    assert run.config.model == config
    chex.assert_trees_all_equal(run.variables, variables)
    assert run.tokenizer.decode(run.tokenizer.encode("def f():")) == "def f():"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_import_may_dequantise(fp8, template, tmp_path, dtype):
    import_checkpoint(fp8, tmp_path / "run", template, dtype=dtype)
    chex.assert_trees_all_equal(
        load_run(tmp_path / "run").variables,
        jax.tree.map(lambda leaf: leaf.astype("float32"), load(fp8, dtype=dtype)[1]))
    export_run(tmp_path / "run", tmp_path / "hf")
    stored = {info.dtype for name, info in Reader(tmp_path / "hf").tensors.items() if "correction_bias" not in name}
    assert stored == {"BF16" if dtype == "bfloat16" else "F32"}
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())


def test_a_kept_model_is_exported_in_bfloat16_on_demand(fp8, imported, tmp_path):
    export_run(imported, tmp_path / "hf", dtype="bf16")
    chex.assert_trees_all_equal(
        load(tmp_path / "hf", dtype="bfloat16")[1], load(fp8, dtype="bfloat16")[1])


def test_rotary_frequencies_and_a_narrow_bias_go_out_as_they_came(fp8, template, tmp_path):
    """Moonlight stores both."""
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    right = 100.0 ** (-np.arange(4, dtype=np.float32) / 4)
    copy = rewrite(fp8, tmp_path / "copy", lambda arrays: arrays.update(
        {name.format(layer): right for layer in range(4)} | {
            key: value.astype("bfloat16") for key, value in arrays.items() if key.endswith("correction_bias")}))
    import_checkpoint(copy, tmp_path / "run", template)
    export_run(tmp_path / "run", tmp_path / "hf")
    assert tensors(tmp_path / "hf") == tensors(copy)
    assert jax.tree.leaves(load_run(tmp_path / "run").variables["routing"])[0].dtype == "float32"


KILLED = """
import sys, time
from pathlib import Path
from dsv3.interop import export as export_module
from dsv3.interop import import_run
from experiments.launch import load_config
actual = import_run.read_part
def slow(*arguments):
    time.sleep(0.02)
    return actual(*arguments)
import_run.read_part, import_run.FLUSH_BYTES = slow, 0
import_run.import_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), load_config("configs/imported.py", []))
"""


@pytest.mark.slow
def test_a_killed_import_continues_where_it_was(fp8, imported, template, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    journal = workdir / "import.partial/journal"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(fp8), str(workdir)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") > 20) and time.monotonic() < deadline:
        assert child.poll() is None, "ended before it was killed"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (workdir / "checkpoints").exists()
    done = journal.read_text().count("\n")
    with journal.open("a") as file:
        file.write("model.layers.2.mlp.experts.7.down_proj.wei")  # a line that a kill has cut off
    with pytest.raises(UserError, match="with another --dtype"):
        import_checkpoint(fp8, workdir, template, dtype="float32")
    read, actual = [], import_run.read_part
    monkeypatch.setattr(import_run, "read_part", lambda *arguments: read.append(1) or actual(*arguments))
    import_checkpoint(fp8, workdir, template)
    assert 20 < done and len(read) == len(Reader(fp8).tensors) - 2 - done
    assert files(workdir / "checkpoints") == files(imported / "checkpoints")
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints", "hf"]


@pytest.mark.parametrize("stage", ["_fill", "check_copies", "_copy_files", "_tokenizer", "finish_imported"])
def test_an_import_that_fails_for_want_of_a_disk_continues(fp8, imported, template, tmp_path, monkeypatch, stage):
    """At every stage; nothing that looks like a run is there in between."""
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(import_run, stage, full)
        with pytest.raises(OSError, match="No space left"):
            import_checkpoint(fp8, tmp_path / "run", template)
    assert not (tmp_path / "run/checkpoints").exists()
    import_checkpoint(fp8, tmp_path / "run", template)
    assert files(tmp_path / "run") == files(imported)


KILLED_EXPORT = """
import sys, time
from pathlib import Path
from dsv3.interop import export, export_run
actual = export._tensor
def slow(*arguments):
    time.sleep(0.01)
    return actual(*arguments)
export._tensor = slow
export.export.__kwdefaults__["file_bytes"] = 200_000
export_run.export_run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_export_continues_with_the_file_it_was_at(fp8, imported, tmp_path, monkeypatch):
    partial = tmp_path / "hf.partial"
    child = subprocess.Popen([sys.executable, "-c", KILLED_EXPORT, str(imported), str(tmp_path / "hf")], cwd=ROOT)
    deadline = time.monotonic() + 120
    while len(list(partial.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        assert child.poll() is None, "ended before it was killed"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "hf").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    made, actual = [], export_module._tensor
    monkeypatch.setattr(export_module, "_tensor", lambda *arguments: made.append(1) or actual(*arguments))
    monkeypatch.setitem(export_module.export.__kwdefaults__, "file_bytes", 200_000)
    export_run(imported, tmp_path / "hf")
    assert {name: (tmp_path / "hf" / name).stat().st_mtime_ns for name in kept} == kept and len(kept) >= 3
    scales = sum(name.endswith("_scale_inv") for name in Reader(fp8).tensors)
    assert 0 < len(made) < len(Reader(fp8).tensors) - scales
    assert tensors(tmp_path / "hf") == tensors(fp8)
    assert not list(tmp_path.rglob("*part*")) and not (tmp_path / "hf/plan.sha256").exists()


def test_an_unfinished_export_of_something_else_is_begun_anew(fp8, imported, tmp_path):
    (tmp_path / "hf.partial").mkdir()
    with pytest.raises(UserError, match="in the way"):
        export_run(imported, tmp_path / "hf")
    (tmp_path / "hf.partial/plan.sha256").write_text("other")
    (tmp_path / "hf.partial/model-00001-of-00001.safetensors").write_bytes(b"other")
    export_run(imported, tmp_path / "hf")
    assert tensors(tmp_path / "hf") == tensors(fp8)


def nan_scale(arrays):
    arrays["model.layers.3.mlp.experts.7.down_proj.weight_scale_inv"][0, 0] = np.nan


def other_head(arrays):
    arrays["model.layers.3.shared_head.head.weight"][0, 0] += 1


def extra(arrays):
    arrays["model.layers.9.mlp.gate.weight"] = np.zeros(3, np.float32)


def truncate(directory):
    path = max(directory.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def remove_shard(directory):
    max(directory.glob("*.safetensors")).unlink()


def claim(directory):
    with max(directory.glob("*.safetensors")).open("r+b") as file:
        file.write((2**50).to_bytes(8, "little"))


@pytest.mark.parametrize("change, damage, message", [
    (nan_scale, None, "not finite"), (other_head, None, "differs from lm_head"), (extra, None, "does not call for"),
    (None, truncate, "cut off"), (None, remove_shard, "lacks 1 of the files"), (None, claim, "claims a header"),
    (None, lambda directory: (directory / "config.json").unlink(), "config.json is missing"),
    (None, lambda directory: (directory / "config.json").write_text("[]"), "not a JSON object"),
])
@pytest.mark.parametrize("there_before", [False, True])
def test_a_corrupt_checkpoint_leaves_nothing_behind(fp8, template, tmp_path, change, damage, message, there_before):
    copy = rewrite(fp8, tmp_path / "copy", change or (lambda arrays: None))
    if damage:
        damage(copy)
    workdir = tmp_path / "run"
    if there_before:
        workdir.mkdir()
        (workdir / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=message):
        import_checkpoint(copy, workdir, template)
    assert files(tmp_path).keys() - {f"copy/{name}" for name in files(copy)} == (
        {"run/notes.txt"} if there_before else set())
    assert workdir.exists() == there_before


def test_a_workdir_with_a_run_is_not_overwritten(fp8, imported, template):
    with pytest.raises(UserError, match="holds a run already"):
        import_checkpoint(fp8, imported, template)


def test_a_flipped_bit_in_an_imported_run_is_found(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "run")
    path = sorted((tmp_path / "run").rglob("*.bin"))[7]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="no undamaged checkpoint"):
        load_run(tmp_path / "run")
    with pytest.raises(UserError, match="is damaged: 1 arrays"):
        export_run(tmp_path / "run", tmp_path / "hf")
    path.write_bytes(content[:-5])
    with pytest.raises(UserError, match="no undamaged checkpoint"):
        load_run(tmp_path / "run")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("text, warning", [
    (None, "has no tokenizer.json"), ('{"model": 3}', "not a tokenizer.json"), ("{", "not a tokenizer.json")])
def test_without_a_tokenizer_only_text_is_missed(fp8, template, tmp_path, caplog, text, warning):
    """Kimi and Moonlight have tiktoken files."""
    shutil.copytree(fp8, tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").unlink()
    (tmp_path / "hf/tiktoken.model").write_bytes(b"\0\1")
    if text:
        (tmp_path / "hf/tokenizer.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        import_checkpoint(tmp_path / "hf", tmp_path / "run", template)
    assert warning in caplog.text
    run = load_run(tmp_path / "run")
    with pytest.raises(UserError, match="came without a tokenizer.json"):
        run.tokenizer.encode("text")
    export_run(tmp_path / "run", tmp_path / "again")
    assert (tmp_path / "again/tiktoken.model").read_bytes() == b"\0\1"


def test_names_of_special_tokens_in_a_text_stay_text_and_no_bos_is_added():
    """Released files have a step that adds the bos, and added tokens that are not special."""
    content = json.loads(byte_tokenizer().to_json())
    for token in content["added_tokens"]:
        token["special"] = False
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": BOS, "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}}}
    tokenizer = released_tokenizer(json.dumps(content))
    assert tokenizer.encode(FIM_HOLE).tolist() == byte_tokenizer().encode(FIM_HOLE).tolist()
    assert tokenizer.encode_batch(["a"])[0].tolist() == byte_tokenizer().encode("a").tolist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of ours, with its corpus."""
    directory = tmp_path_factory.mktemp("trained")
    config = small_config(write_corpus(directory / "text"), **{"train.steps": "2"})
    train(config, directory / "run", reference_ops())
    return config, directory / "run"


@pytest.mark.slow
def test_a_trained_run_goes_out_and_comes_back_as_it_was(trained, template, tmp_path):
    _, workdir = trained
    run = load_run(workdir)
    export_run(workdir, tmp_path / "hf", dtype="float32")
    import_checkpoint(tmp_path / "hf", tmp_path / "again", template)
    again = load_run(tmp_path / "again")
    assert to_dict(again.config.model) | {"remat": "none"} == to_dict(run.config.model)
    chex.assert_trees_all_equal(again.variables, run.variables)
    assert again.tokenizer.encode("def f").tolist() == run.tokenizer.encode("def f").tolist()
    hf = json.loads((tmp_path / "hf/config.json").read_text())
    assert (hf["model_type"], hf["max_position_embeddings"], hf["eos_token_id"]) == ("deepseek_v3", 32, 1)
    export_run(workdir, tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert Reader(tmp_path / "bf16").tensors["lm_head.weight"].dtype == "BF16"


@pytest.mark.slow
def test_the_exported_tokenizer_puts_the_bos_first_as_training_did(trained, tmp_path):
    import tokenizers
    export_run(trained[1], tmp_path / "hf")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    ours = load_run(trained[1]).tokenizer
    assert backend.encode("def f").ids == [ours.bos_id, *ours.encode("def f").tolist()]
    about = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert about["bos_token"] == BOS and about["model_max_length"] == 32


@pytest.mark.slow
def test_training_goes_on_from_imported_weights(trained, template, tmp_path):
    """With fresh moments; and from its own checkpoint afterwards. Other models and vocabularies are refused."""
    config, workdir = trained
    export_run(workdir, tmp_path / "hf", dtype="float32")
    import_checkpoint(tmp_path / "hf", tmp_path / "run", template)
    before = load_run(tmp_path / "run").variables["params"]
    with pytest.raises(UserError, match="imported weights of another model .model.n_layers"):
        train(override(config, {"model.n_layers": "3"}), tmp_path / "run", reference_ops(row_block=8))
    shutil.rmtree(tmp_path / "run/data")
    other = override(config, {"data.tokenizer": "bpe", "data.bpe_vocab_size": "280"})
    with pytest.raises(UserError, match="tokens of another vocabulary"):
        train(other, tmp_path / "run", reference_ops(row_block=8))
    shutil.rmtree(tmp_path / "run/data")
    result = train(override(config, {"train.steps": "1", "train.checkpoint_every": "1"}), tmp_path / "run",
                   reference_ops(row_block=8))
    assert int(result.state.step) == 1 and int(result.state.opt_state[1].count) == 1
    moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), jax.device_get(result.state.params), before)
    assert 0 < max(jax.tree.leaves(moved)) < 0.02, "weights began anew"
    assert int(train(override(config, {"train.steps": "2"}), tmp_path / "run",
                     reference_ops(row_block=8)).state.step) == 2
    export_run(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 32


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_read_half_each_and_restore_an_imported_run(fp8, imported, tmp_path):
    """Half, and what has no even axis twice."""
    shutil.copytree(fp8, tmp_path / "hf")
    shutil.copytree(imported, tmp_path / "run")
    with job(tmp_path, ["tests/importers.py", str(tmp_path)], size=2) as (ranks, outputs):
        statuses = [rank.wait(90) for rank in ranks]
    for output in outputs:
        text = output.read_text()
        assert statuses == [0, 0] and "restored" in text, text
        assert 0.5 <= float(text.split("read ")[1].split(" of")[0]) < 0.55


@pytest.mark.slow
def test_the_peak_memory(tmp_path, monkeypatch):
    """0.9 GB. An import stays below its destination, on the disk; a load above its, in memory, by little."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # as a user has it: unoptimized, the copies take minutes
    size = write_fp8(tmp_path / "hf", v3_like(5), seed=0)
    _, importing = measured(import_command(tmp_path / "hf", tmp_path / "run"))
    stored = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.bin"))
    assert 0.8e9 < stored < size
    assert importing < 0.9 * stored
    _, loading = measured(load_command(tmp_path / "hf"))
    assert stored < loading < 1.15 * stored + 1e9


@pytest.mark.slow
def test_the_commands(fp8, tmp_path):
    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "experiments.convert", *arguments], cwd=ROOT, capture_output=True,
                              text=True)

    done = command("import", f"--hf={fp8}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    done = command("export", f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert tensors(tmp_path / "hf") == tensors(fp8)
    bad = command("export", f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}")
    assert bad.returncode == 2 and bad.stderr.strip().splitlines()[-1].startswith("error: ")
    for arguments in (["import", f"--hf={fp8}", f"--workdir={tmp_path / 'x'}", "--dtype=fp8"], ["convert"], [],
                      ["import", f"--hf={tmp_path / 'nothing'}", f"--workdir={tmp_path / 'x'}"]):
        bad = command(*arguments)
        assert bad.returncode == 2 and "error: " in bad.stderr and "Traceback" not in bad.stderr
    assert not (tmp_path / "x").exists()
