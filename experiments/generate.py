"""Generate text from a run: python -m experiments.generate --workdir=runs/tiny --prompt='def '"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags

from dsv3.config import Config, require
from dsv3.data.tokenizer import Tokenizer
from dsv3.inference.generate import make_generator
from dsv3.model.ops import reference_ops
from dsv3.model.transformer import Transformer
from dsv3.train.checkpoint import Checkpoints, open_run, placed
from dsv3.train.step import init_state
from experiments import launch

WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run", required=True)
PROMPT = flags.DEFINE_string("prompt", "", "text to continue")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "stop after this many tokens")
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 is greedy")
TOP_P = flags.DEFINE_float("top_p", 0.95, "sample from the most likely tokens that hold this much probability")
SEED = flags.DEFINE_integer("seed", 0, "of the sampling")
CACHE_LENGTH = flags.DEFINE_integer("cache_length", None, "slots of the cache; default: the training length")


def load_run(workdir: Path) -> tuple[Config, Tokenizer, dict]:
    """Configuration, tokenizer and variables (params and routing) of the newest checkpoint."""
    with Checkpoints(open_run(workdir)) as checkpoints:
        config, tokenizer_json = checkpoints.restore_description()
        model = Transformer(config.model, reference_ops())
        abstract = jax.eval_shape(lambda: init_state(model, config.train))
        state = checkpoints.restore(placed(abstract)).state
    return config, Tokenizer.from_json(tokenizer_json), {"params": state.params, "routing": state.routing}


def continue_text(
    config: Config, tokenizer: Tokenizer, variables: dict, prompt: str, *, cache_length: int | None = None, **sampling,
) -> Iterator[str]:
    """Pieces of text that follow `prompt`, as they are generated; `sampling` goes to `generate`."""
    length = cache_length or config.train.seq_len
    model = Transformer(dataclasses.replace(config.model, remat="none"), reference_ops(row_block=8))
    generate = make_generator(model, tokenizer.vocab_size, length)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    return tokenizer.decode_stream(generate(variables, ids, eos_id=tokenizer.eos_id, **sampling))


def main(overrides: Sequence[str]) -> None:
    require(not overrides, "a run keeps its own configuration; --config fields cannot be set here")
    config, tokenizer, variables = load_run(Path(WORKDIR.value))
    pieces = continue_text(
        config, tokenizer, variables, PROMPT.value, cache_length=CACHE_LENGTH.value,
        max_new_tokens=MAX_NEW_TOKENS.value, temperature=TEMPERATURE.value, top_p=TOP_P.value, seed=SEED.value)
    print(PROMPT.value, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    launch.run(main)
