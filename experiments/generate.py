"""Generate text from a run: python -m experiments.generate --workdir=runs/tiny --prompt='def '

With --chat the prompt is a user's turn, written as the template of an imported chat model says (WORKDIR/hf), and the
answer of the assistant is printed.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dsv3.config import require
from dsv3.inference.chat import read_template, reply
from dsv3.inference.text import continue_text
from dsv3.parallel.ops import text_ops
from experiments import launch
from experiments.runs import load_run

WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run", required=True)
PROMPT = flags.DEFINE_string("prompt", "", "text to continue")
CHAT = flags.DEFINE_bool("chat", False, "the prompt is a user's turn; print the assistant's")
SYSTEM = flags.DEFINE_string("system", None, "with --chat: what a system turn before the prompt says")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "stop after this many tokens")
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 is greedy")
TOP_P = flags.DEFINE_float("top_p", 0.95, "sample from the most likely tokens that hold this much probability")
EMA = flags.DEFINE_bool("ema", False, "use the moving average of the weights")
SEED = flags.DEFINE_integer("seed", 0, "of the sampling")
CACHE_LENGTH = flags.DEFINE_integer("cache_length", None, "slots of the cache; default: the training length")


def main(overrides: Sequence[str]) -> None:
    require(not overrides, "a run keeps its own configuration; --config fields cannot be set here")
    for flag, text in {"--prompt": PROMPT.value, "--system": SYSTEM.value or ""}.items():
        require(text.encode("utf-8", "replace").decode() == text, f"{flag} is not valid UTF-8")
    require(CHAT.value or SYSTEM.value is None, "--system is a turn of a conversation; add --chat")
    template = read_template(Path(WORKDIR.value) / "hf") if CHAT.value else None
    run = load_run(Path(WORKDIR.value), ema=EMA.value)
    model = run.config.model, text_ops(run.config.recipe), run.variables, run.tokenizer
    how = dict(
        cache_length=run.config.train.seq_len if CACHE_LENGTH.value is None else CACHE_LENGTH.value,
        max_new_tokens=MAX_NEW_TOKENS.value, temperature=TEMPERATURE.value, top_p=TOP_P.value, seed=SEED.value)
    if template is None:
        pieces = continue_text(*model, PROMPT.value, **how)
        print(PROMPT.value, end="", flush=True)
    else:
        turns = {"system": SYSTEM.value, "user": PROMPT.value}
        messages = [{"role": role, "content": text} for role, text in turns.items() if text is not None]
        pieces = reply(*model, template, messages, **how)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    launch.run(main)
