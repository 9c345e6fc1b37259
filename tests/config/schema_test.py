"""Overrides by path, types, and every rule of validation: a mistake is a `UserError` of one line naming its field."""

import dataclasses
import json
import math
import re

import pytest
from tiny_models import YARN, model_config, train_config

from dsv3.config import (
    Config,
    DataConfig,
    MeshConfig,
    Phase,
    SourceConfig,
    UserError,
    differences,
    from_dict,
    override,
    require,
    to_dict,
)

DATA = DataConfig(
    sources=(SourceConfig(files=None, text_field="text", weight=1.0),), validation_fraction=0.1, tokenizer="bytes",
    bpe_vocab_size=60, split_rate=0.0, fim_rate=0.0, segment_ids=False, eval_bytes=100, eval_stride=4, seed=0)
RAMP = (
    Phase(until=1000, start=2, end=8, shape="linear"),
    Phase(until=math.inf, start=8, end=8, shape="constant"))
TRAIN = train_config(
    steps=10, seq_len=16, batch_size=RAMP, learning_rate=RAMP, eval_every=5, checkpoint_every=5,
    optimizer=dict(moment_dtype="bfloat16"), balance_alpha=1e-4)
CONFIG = Config(model=model_config(attention=dict(yarn=YARN)), data=DATA, train=TRAIN,
                mesh=MeshConfig(data=1), kernels="reference", quant="bf16")


def message(raiser, *arguments, **keywords):
    """The one line of the `UserError` that a call raises."""
    with pytest.raises(UserError) as error:
        raiser(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(path, text):
    return message(override, CONFIG, {path: text})


def paths(node, prefix=""):
    """Every dotted path of a `to_dict` tree with its value."""
    if not isinstance(node, (dict, list, tuple)):
        return {prefix.strip("."): node}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {path: leaf for name, child in items for path, leaf in paths(child, f"{prefix}.{name}").items()}


@pytest.mark.parametrize("path, said", [
    ("model.moe.n_routed_expert", "config.model.moe has no field 'n_routed_expert'; did you mean 'n_routed_experts'?"),
    ("model.atention.n_heads", "config.model has no field 'atention'; did you mean 'attention'?"),
    ("modle.dim", "config has no field 'modle'; did you mean 'model'?"),
    ("train.lerning_rate.0.start", "config.train has no field 'lerning_rate'; did you mean 'learning_rate'?"),
    ("data.zzz", "config.data has no field 'zzz'; choose from: sources, validation_fraction,"),
    ("train.learning_rate.2.start", "config.train.learning_rate has no field '2'; choose from: 0, 1"),
    ("train.learning_rate.-1.start", "config.train.learning_rate has no field '-1'"),
    ("train.seed.low", "config.train.seed is 0 and has no fields to set"),
    ("model.attention.yarn.factors", "did you mean 'factor'?"),
    ("", "config has no field ''"),
])
def test_unknown_fields_name_the_nearest(path, said):
    assert said in refused(path, "1")


@pytest.mark.parametrize("path, text, said", [
    ("train.steps", "many", "expected int"),
    ("train.steps", "1.0", "expected int"),
    ("train.steps", "True", "expected int"),
    ("train.balance_alpha", "true", "expected float"),
    ("train.balance_alpha", "", "expected float"),
    ("data.segment_ids", "1", "expected bool"),
    ("data.segment_ids", "yes", "expected bool"),
    ("data.tokenizer", "word", "expected one of 'bpe', 'bytes', 'deepseek_v3'"),
    ("model.attention.q_lora_rank", "1.5", "expected int | None"),
    ("model.attention.kv_lora_rank", "none", "expected int"),
    ("train.learning_rate", "3e-4", "config.train.learning_rate='3e-4' has the wrong type"),
    ("model.moe", "8", "config.model.moe='8' has the wrong type; expected MoEConfig"),
])
def test_wrong_types_say_what_is_expected(path, text, said):
    found = refused(path, text)
    assert said in found and f"config.{path}={text!r}" in found


@pytest.mark.parametrize("path, text, value", [
    ("train.steps", "12_000", 12_000),
    ("train.balance_alpha", "1e-3", 1e-3),
    ("train.balance_alpha", "0", 0),
    ("data.segment_ids", "true", True),
    ("data.segment_ids", "False", False),
    ("data.sources.0.text_field", "content", "content"),
    ("data.sources.0.text_field", "'none'", "none"),
    ("data.sources.0.text_field", "2024", "2024"),
    ("data.sources.0.files", "None", None),
    ("data.sources.0.weight", "3", 3),
    ("data.tokenizer", "bpe", "bpe"),
    ("model.attention.q_lora_rank", "none", None),
    ("model.attention.q_lora_rank", "7", 7),
    ("model.attention.yarn", "none", None),
    ("model.attention.yarn.factor", "8", 8),
    ("train.learning_rate.0.start", "3", 3),
    ("train.batch_size.1.end", "8.0", 8.0),
])
def test_an_override_changes_its_field_and_nothing_else(path, text, value):
    before = to_dict(CONFIG)
    changed = override(CONFIG, {path: text})
    after = paths(to_dict(changed))
    assert after[path] == value and type(after[path]) is type(value)
    inside = lambda name: name == path or name.startswith(path + ".")
    assert {n: v for n, v in after.items() if not inside(n)} == {
        n: v for n, v in paths(before).items() if not inside(n)}
    assert to_dict(CONFIG) == before


@pytest.mark.parametrize("text, value", [
    ("corpus/**/*.jsonl", ("corpus/**/*.jsonl",)),
    ("a.txt,b/*.md, c", ("a.txt", "b/*.md", "c")),
    ("('a,b', 'c')", ("a,b", "c")),
    ("('a',)", ("a",)),
    ("1,2", ("1", "2")),
    ("2024", ("2024",)),
    ("none", None),
    ("[ab].txt", ("[ab].txt",)),
])
def test_files_are_written_with_commas_or_as_a_literal(text, value):
    assert override(CONFIG, {"data.sources.0.files": text}).data.sources[0].files == value


def test_one_of_several_files_is_replaced_by_its_index():
    several = override(CONFIG, {"data.sources.0.files": "a,b"})
    assert override(several, {"data.sources.0.files.1": "c,d"}).data.sources[0].files == ("a", "c,d")
    assert from_dict(Config, json.loads(json.dumps(to_dict(several)))) == several


def test_only_tuples_of_text_are_split_at_commas():
    for path in ("train.learning_rate", "data.sources", "train.seed"):
        assert "has the wrong type" in refused(path, "1,2")
    assert override(CONFIG, {"data.sources.0.text_field": "a,b"}).data.sources[0].text_field == "a,b"


def test_there_is_a_source():
    assert "data.sources is empty" in message(dataclasses.replace, DATA, sources=())


def test_the_released_tokenizer_fits_its_own_embedding():
    override(CONFIG, {"data.tokenizer": "deepseek_v3", "model.vocab_size": "128815"})


def test_untouched_branches_are_the_same_objects():
    changed = override(CONFIG, {"train.learning_rate.0.start": "3"})
    assert changed.model is CONFIG.model and changed.data is CONFIG.data
    assert changed.train.optimizer is CONFIG.train.optimizer
    assert changed.train.learning_rate[1] is CONFIG.train.learning_rate[1]
    assert override(CONFIG, {}) is CONFIG


def test_values_that_are_only_valid_together_are_set_together():
    experts, groups = {"model.moe.n_routed_experts": "15"}, {"model.moe.n_expert_groups": "5"}
    assert "15" in message(override, CONFIG, experts)
    assert "5" in message(override, CONFIG, groups)
    moe = override(CONFIG, experts | groups).model.moe
    assert (moe.n_routed_experts, moe.n_expert_groups) == (15, 5)
    across = {"train.seq_len": "3", "data.eval_stride": "3"}
    assert "eval_stride" in message(override, CONFIG, {"train.seq_len": "3"})
    assert override(CONFIG, across).train.seq_len == 3


@pytest.mark.parametrize("whole, part", [
    ("model.attention.yarn", "model.attention.yarn.factor"),
    ("train.learning_rate", "train.learning_rate.0.start"),
])
def test_a_whole_and_its_part_cannot_both_be_set(whole, part):
    for order in ([whole, part], [part, whole]):
        said = message(override, CONFIG, {path: "2" if path == part else "none" for path in order})
        assert said == f"config.{whole} is set both as a whole and field by field; keep one"


def test_fields_of_an_absent_option_cannot_be_set():
    plain = override(CONFIG, {"model.attention.yarn": "none"})
    assert "config.model.attention.yarn is None" in message(override, plain, {"model.attention.yarn.factor": "8"})


@pytest.mark.parametrize("node", [CONFIG, CONFIG.model, CONFIG.model.moe, CONFIG.train.optimizer, RAMP[0], YARN])
def test_configs_are_frozen_and_hash_by_value(node):
    name = dataclasses.fields(node)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(node, name, getattr(node, name))
    twin = dataclasses.replace(node)
    assert twin is not node and twin == node and hash(twin) == hash(node)


def test_json_restores_the_same_tree():
    data = json.loads(json.dumps(to_dict(CONFIG)))
    assert from_dict(Config, data) == CONFIG
    assert from_dict(Config, data).train.learning_rate[-1].until == math.inf


def test_from_dict_refuses_missing_unknown_and_wrong_fields():
    data = json.loads(json.dumps(to_dict(CONFIG)))
    missing = data | {"data": {k: v for k, v in data["data"].items() if k != "seed"}}
    assert "DataConfig has fields" in message(from_dict, Config, missing)
    assert "'sed'" in message(from_dict, Config, data | {"data": data["data"] | {"sed": 0}})
    assert "DataConfig.seed is 'x'" in message(from_dict, Config, data | {"data": data["data"] | {"seed": "x"}})


def test_differences_lists_paths_with_both_values():
    changed = override(CONFIG, {"model.attention.yarn": "none", "train.steps": "11"})
    assert differences(to_dict(CONFIG), to_dict(CONFIG)) == []
    found = differences(to_dict(CONFIG), to_dict(changed))
    assert [line.split(": ")[0] for line in found] == ["model.attention.yarn", "train.steps"]
    assert found[1] == "train.steps: 10 != 11"


def test_differences_look_into_sequences_lists_and_tuples_alike():
    changed = to_dict(override(CONFIG, {"data.sources.0.files": "a,b", "train.learning_rate.1.end": "9",
                                        "train.learning_rate.1.start": "9"}))
    assert differences(changed, json.loads(json.dumps(changed))) == []
    assert differences(to_dict(CONFIG), changed) == [
        "data.sources.0.files: None != ('a', 'b')", "train.learning_rate.1.end: 8 != 9",
        "train.learning_rate.1.start: 8 != 9"]
    longer = changed | {"data": to_dict(override(CONFIG, {"data.sources.0.files": "a,b,c"}))["data"]}
    assert differences(changed, longer) == ["data.sources.0.files.2: None != 'c'"]


def test_require():
    require(True, "unused")
    assert message(require, False, "why") == "why"
    assert issubclass(UserError, ValueError)


SIZES = {
    "model": ["vocab_size", "dim", "inter_dim", "n_layers", "norm_eps", "init_std"],
    "model.attention": ["n_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                        "norm_eps"],
    "model.moe": ["n_routed_experts", "n_activated_experts", "n_expert_groups", "n_limited_groups", "moe_inter_dim"],
    "data": ["bpe_vocab_size", "eval_bytes", "eval_stride"],
    "train": ["steps", "seq_len", "micro_batch_size", "batch_increment", "log_every", "eval_every", "checkpoint_every",
              "keep_checkpoints"],
    "train.optimizer": ["clip_norm"],
}


@pytest.mark.parametrize("text", ["0", "-1"])
@pytest.mark.parametrize("path", [f"{node}.{name}" for node, names in SIZES.items() for name in names])
def test_sizes_are_positive(path, text):
    node, _, name = path.rpartition(".")
    assert f"{node.rpartition('.')[2]}.{name} is {text}" in refused(path, text)


@pytest.mark.parametrize("overrides, said", [
    # Config
    ({"model.mtp.depth": "16"}, "model.mtp.depth 16 leaves no position of train.seq_len 16"),
    ({"data.eval_stride": "17"}, "data.eval_stride 17 exceeds train.seq_len 16"),
    # data
    ({"data.validation_fraction": "0"}, "data.validation_fraction is 0"),
    ({"data.validation_fraction": "1.0"}, "data.validation_fraction is 1.0"),
    ({"data.fim_rate": "-0.1"}, "data.fim_rate is -0.1"),
    ({"data.fim_rate": "1.1"}, "data.fim_rate is 1.1"),
    # model
    ({"model.n_dense_layers": "-1"}, "model.n_dense_layers -1 is not between 0 and model.n_layers 3"),
    ({"model.n_dense_layers": "4"}, "model.n_dense_layers 4 is not between 0 and model.n_layers 3"),
    ({"model.mtp.depth": "-1"}, "mtp.depth is -1"),
    ({"model.attention.qk_rope_head_dim": "7"}, "attention.qk_rope_head_dim is 7"),
    ({"model.attention.yarn.factor": "0.5"}, "yarn.factor is 0.5"),
    ({"model.attention.yarn.beta_fast": "0.5"}, "yarn.beta_fast 0.5 must be at least beta_slow 1.0"),
    ({"model.attention.yarn.beta_slow": "0"}, "beta_slow 0"),
    ({"model.moe.n_shared_experts": "-1"}, "moe.n_shared_experts is -1"),
    ({"model.moe.n_routed_experts": "9"}, "moe.n_routed_experts 9 is not divisible by moe.n_expert_groups 4"),
    ({"model.moe.n_limited_groups": "5"}, "moe.n_limited_groups 5 exceeds moe.n_expert_groups 4"),
    ({"model.moe.n_activated_experts": "5"}, "moe.n_activated_experts 5 exceeds the 4 experts"),
    ({"model.moe.n_expert_groups": "8", "model.moe.n_limited_groups": "8"}, "a group is scored by its two best"),
    # train
    ({"train.warmup_steps": "-1"}, "train.warmup_steps is -1"),
    ({"train.batch_increment": "3", "train.batch_size.0.start": "4"}, "train.batch_increment 3 is not divisible by"),
    ({"train.batch_size.0.start": "1"}, "train.batch_size falls to 1 sequences, below train.batch_increment 2"),
    ({"train.optimizer.b1": "1.0"}, "optimizer.b1 is 1.0"),
    ({"train.optimizer.b2": "-0.1"}, "optimizer.b2 is -0.1"),
    ({"train.learning_rate.0.until": "0"}, "phase.until is 0"),
    ({"train.learning_rate.0.shape": "constant"}, "a constant phase has start 2 and end 8"),
    ({"train.learning_rate.1.shape": "cosine"}, "a cosine phase needs a finite phase.until"),
    ({"train.learning_rate.1.until": "1000"}, "train.learning_rate: phases end at [1000, 1000]; expected strictly"),
    ({"train.mtp_lambda.0.start": "-1", "train.mtp_lambda.0.end": "-1"}, "train.mtp_lambda falls to -1"),
    ({"train.learning_rate.0.end": "nan"}, "expected finite values"),
    ({"train.seed": "99999999999999999999"}, "train.seed is 99999999999999999999"),
    ({"data.seed": "-1"}, "data.seed is -1"),
    ({"data.split_rate": "1.5"}, "data.split_rate is 1.5"),
    ({"data.fim_rate": "-0.5"}, "data.fim_rate is -0.5"),
    ({"data.sources.0.files": ""}, "source.files is ('',)"),
    ({"data.sources.0.files": "a,,b"}, "source.files is ('a', '', 'b')"),
    ({"data.sources.0.files": "()"}, "source.files is ()"),
    ({"data.sources.0.text_field": ""}, "source.text_field is empty"),
    ({"data.sources.0.weight": "0"}, "source.weight is 0"),
    ({"data.sources.0.weight": "inf"}, "source.weight is inf"),
    ({"data.tokenizer": "deepseek_v3"}, "deepseek_v3 has 128815 tokens, more than model.vocab_size 61"),
    ({"data.tokenizer": "deepseek_v3", "model.vocab_size": "128814"}, "more than model.vocab_size 128814"),
    ({"data.tokenizer": "bpe", "data.bpe_vocab_size": "62"}, "data.bpe_vocab_size 62 exceeds model.vocab_size 61"),
    ({"train.balance_alpha": "-0.1"}, "train.balance_alpha is -0.1"),
    ({"train.optimizer.eps": "0"}, "optimizer.eps is 0"),
    ({"train.optimizer.weight_decay": "-1"}, "optimizer.weight_decay is -1"),
    ({"model.attention.rope_theta": "0"}, "attention.rope_theta is 0"),
    ({"model.moe.route_scale": "0"}, "moe.route_scale is 0"),
    ({"train.mtp_lambda.0.until": "7"}, "train.mtp_lambda: the last phase ends at 7; expected inf"),
])
def test_rules(overrides, said):
    assert said in message(override, CONFIG, overrides)


@pytest.mark.parametrize("name", ["batch_size", "learning_rate", "bias_update_speed", "mtp_lambda"])
def test_schedules_are_not_empty(name):
    assert f"train.{name} is empty" in message(dataclasses.replace, TRAIN, **{name: ()})


def test_two_experts_a_group_are_needed_only_by_the_two_best_rule():
    moe = {"model.moe.n_expert_groups": "8", "model.moe.n_limited_groups": "8"}
    assert override(CONFIG, moe | {"model.moe.selection_bias": "false"}).model.moe.experts_per_group == 1


@pytest.mark.parametrize("keywords, said", [
    (dict(until="1"), r"Phase.until is '1'; expected float"),
    (dict(start=None), r"Phase.start is None; expected float"),
    (dict(end=True), r"Phase.end is True; expected float"),
    (dict(shape="square"), r"Phase.shape is 'square'; expected one of 'constant', 'linear', 'cosine'"),
])
def test_constructors_check_types(keywords, said):
    assert re.search(said, message(Phase, **(dict(until=1.0, start=0.0, end=0.0, shape="constant") | keywords)))


@pytest.mark.parametrize("schedule", [[RAMP[0]], (1.0,), RAMP[1], None, (RAMP[1], "x")])
def test_a_schedule_is_a_tuple_of_phases(schedule):
    assert "TrainConfig.learning_rate is" in message(dataclasses.replace, TRAIN, learning_rate=schedule)
