"""A run as a Hugging Face checkpoint that vLLM, SGLang and transformers read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsv3.config import Config, MeshConfig, require
from dsv3.data.tokenizer import BOS, EOS, Tokenizer
from dsv3.interop.export import Arrays, export, flatten
from dsv3.interop.import_run import HF
from dsv3.interop.safetensors import read_json
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import make_mesh, on_one_device
from dsv3.quant.blocks import Blocks
from dsv3.train.checkpoint import Checkpoints, Description, open_run
from dsv3.train.step import abstract_state, make_recipe

DTYPES = {"bf16": "bfloat16", "float32": "float32", "fp8": "bfloat16"}
"""`--dtype` -> torch_dtype of the exported configuration."""


def export_run(workdir: Path, hf: Path, *, dtype: str | None = None, ema: bool = False) -> None:
    """Write the newest checkpoint of `workdir` to the new directory `hf`, with its tokenizer and chat template.

    `dtype` None: imported weights as they were stored (bit for bit, FP8 with its scales), others in bfloat16. With
    `ema`, the moving average of the weights. The same call continues an interrupted export. Raises `UserError` as
    `export` does.
    """
    with Checkpoints(open_run(workdir)) as checkpoints:
        identity = f"{checkpoints.identity()} {ema}"
        arrays, description = _arrays(checkpoints, ema)
    imported = not description.data
    dtype = dtype if imported else dtype or "bf16"
    require(dtype is None or dtype in DTYPES, f"--dtype={dtype}; expected one of {', '.join(DTYPES)}")
    model = description.config.model
    if dtype is not None:
        model = dataclasses.replace(model, dtype=DTYPES[dtype])
    base, files = _came_with(workdir / HF) if (workdir / HF).is_dir() else _made_here(description)
    with tqdm(unit="B", unit_scale=True, desc="export", disable=None) as bar:
        export(model, arrays, hf, dtype=dtype, base=base, files=files, identity=identity,
               begin=bar.reset, done=bar.update)


def _arrays(checkpoints: Checkpoints, ema: bool) -> tuple[Arrays, Description]:
    """The weights by path: imported ones mapped from their files, others in memory."""
    imported = checkpoints.imported()
    if imported is not None:
        require(not ema, "imported weights have no moving average")
        return _by_path(imported[0]), imported[1]
    config = checkpoints.describe().config
    model = Transformer(config.model, reference_ops())
    recipe = make_recipe(model, config.train, config.data.segment_ids, make_mesh(MeshConfig(data=1)))
    variables, description = checkpoints.restore_variables(abstract_state(recipe), ema=ema)
    return flatten(on_one_device(variables)), description


def _by_path(arrays: dict[str, Any]) -> Arrays:
    """Stored arrays, with values and scales as `Blocks`."""
    found = {}
    for name, array in arrays.items():
        path = tuple(name.split("/"))
        if path[-1] == "values":
            found[path[:-1]] = Blocks(array, arrays[name.removesuffix("values") + "scales"])
        elif path[-1] != "scales":
            found[path] = array
    return found


def _came_with(directory: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The configuration and the files of an imported model."""
    files = {str(path.relative_to(directory)): path.read_bytes()
             for path in sorted(directory.rglob("*")) if path.is_file()}
    return read_json(directory / "config.json"), {name: text for name, text in files.items() if name != "config.json"}


def _made_here(description: Description) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a model that was trained here needs beside its weights: lengths, ids, the tokenizer."""
    config = description.config
    tokenizer = Tokenizer.from_json(description.tokenizer)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    length = _length(config)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
        "clean_up_tokenization_spaces": False, "model_max_length": length}
    files = {"tokenizer.json": _with_bos(tokenizer), "tokenizer_config.json": about, "generation_config.json": ids}
    text = {name: json.dumps(content, ensure_ascii=False, indent=2) + "\n" for name, content in files.items()}
    return {"max_position_embeddings": length} | ids, {name: content.encode() for name, content in text.items()}


def _length(config: Config) -> int:
    yarn = config.model.attention.yarn
    return config.train.seq_len if yarn is None else int(yarn.factor * yarn.original_seq_len)


def _with_bos(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer's JSON with a step that puts the bos before a text, as training has seen it."""
    content = json.loads(tokenizer.to_json())
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    template = {
        "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [tokenizer.bos_id], "tokens": [BOS]}}}
    before = content.get("post_processor")
    content["post_processor"] = template if before is None else {
        "type": "Sequence", "processors": [before, template]}
    return content
