"""Conversations as a checkpoint's own template writes them: the Jinja text that is published beside a tokenizer.

A template is foreign code: it runs in a sandbox, sees plain data only, and may raise anything.
"""

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import chex
import jinja2
import jinja2.ext
import jinja2.sandbox

from dsv3.config import ModelConfig, UserError, require
from dsv3.data.tokenizer import Tokenizer
from dsv3.inference.text import continue_ids
from dsv3.model.ops import Ops

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Messages = Sequence[Mapping[str, Any]]


class ChatTemplate(NamedTuple):
    """The text of a template, and the names of special tokens that it may ask for (`bos_token` -> its text)."""

    source: str
    specials: dict[str, str]


def read_template(directory: Path) -> ChatTemplate:
    """The template of a checkpoint: `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`.

    The key holds one template or several with names, of which "default" serves. Raises `UserError` where there is none.
    """
    config = _read(directory / TOKENIZER_CONFIG, json.loads)
    config = config if isinstance(config, dict) else {}
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {named.get("name"): named.get("template") for named in found if isinstance(named, dict)}.get("default")
    found = _read(directory / TEMPLATE, str) or found
    require(isinstance(found, str), f"{directory} holds no chat template (no {TEMPLATE}, no default chat_template in "
            f"{TOKENIZER_CONFIG}); only an imported chat model has one: leave --chat out to continue plain text")
    tokens = {name: config.get(name) for name in SPECIALS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return ChatTemplate(found, {name: text for name, text in texts.items() if isinstance(text, str)})


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """What a text file holds, None where there is no file."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); import the checkpoint again") from error


def render(template: ChatTemplate, messages: Messages, *, add_generation_prompt: bool) -> str:
    """The conversation as text, with special tokens by name; `add_generation_prompt` begins the assistant's next turn.

    A message is `{"role": ..., "content": ...}`; keys that are None are left out. What templates may rely on is what
    transformers gives them: trimmed blocks, `break`, `continue`, `tojson`, `raise_exception`, `strftime_now`.
    Raises `UserError` when the template has a mistake or refuses the conversation.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return environment.from_string(template.source).render(
            messages=given, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
            **template.specials)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the chat template cannot write this conversation ({reason})") from error


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """Unlike Jinja's own filter it leaves HTML characters alone."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def reply(
    config: ModelConfig, ops: Ops, variables: chex.ArrayTree, tokenizer: Tokenizer, template: ChatTemplate,
    messages: Messages, *, cache_length: int, **sampling: Any,
) -> Iterator[str]:
    """Pieces of the assistant's next turn, as they are generated, up to the end-of-sentence token.

    `sampling` goes to `generate`: max_new_tokens, temperature, top_p, seed. Raises `UserError` as it and `render` do.
    """
    text = render(template, messages, add_generation_prompt=True)
    ids = tokenizer.encode(text, specials=True).tolist()
    return continue_ids(config, ops, variables, tokenizer, ids, cache_length=cache_length, **sampling)
