"""Recipes are data: each named one changes exactly what it says, and what cannot work is refused in one line."""

import json
from dataclasses import replace

import pytest

from dsv3.config import (
    Layers,
    Operand,
    QuantConfig,
    Rule,
    Site,
    UserError,
    differences,
    from_dict,
    override,
    resolve,
    to_dict,
)
from dsv3.config.quant import FORMATS, OPERANDS, RECIPES, SITES, change_all, change_operands
from dsv3.quant import formats
from experiments.launch import load_config

FP8 = resolve("fp8")
RULE = FP8.default


def changed(recipe):
    """Paths at which a recipe differs from the report's."""
    return {line.split(":")[0] for line in differences(to_dict(FP8), to_dict(recipe))}


def under_every_rule(*paths):
    return {f"{rule}.{path}" for rule in ("default", "sites.0.rule", "sites.1.rule", "sites.2.rule") for path in paths}


def test_the_report():
    """E4M3 but for one waiting tensor; activations by 1 x 128, weights by 128 x 128; powers of two where it says so."""
    for site in SITES:
        rule = FP8.rule_of(site)
        operands = {name: getattr(rule, name) for name in OPERANDS}
        assert {operand.format for operand in operands.values()} == {"e4m3"}
        assert {name for name, operand in operands.items() if operand.tile == "block"} == {"fprop_w", "dgrad_w"}
        assert {name for name, operand in operands.items() if operand.tile == "inner"} == OPERANDS_BUT_WEIGHTS
        assert (rule.interval, rule.accumulator) == (128, "float32")
    assert FP8.rule_of("attn.o").kept == Operand(format="e5m6", tile="inner", power_of_two=True)
    powers = {(site, name) for site in SITES for name in OPERANDS if getattr(FP8.rule_of(site), name).power_of_two}
    assert powers == {("experts.gate_up", "fprop_x"), ("experts.down", "dgrad_dy")}
    for site in set(SITES) - {"attn.o"}:
        assert FP8.rule_of(site).kept == FP8.rule_of(site).fprop_x
    assert FP8.swiglu_kept == RULE.fprop_x


OPERANDS_BUT_WEIGHTS = set(OPERANDS) - {"fprop_w", "dgrad_w"}


@pytest.mark.parametrize("name, paths", [
    ("fp8_e5m2_gradients", under_every_rule("dgrad_dy.format", "wgrad_dy.format")),
    ("fp8_block_gradients", under_every_rule("dgrad_dy.tile")),
    ("fp8_without_e5m6", {"sites.0.rule.kept.format", "sites.0.rule.kept.power_of_two"}),
    ("fp8_direct", under_every_rule("kept")),
    ("fp8_per_tensor", under_every_rule(*(f"{name}.tile" for name in (*OPERANDS, "kept"))) | {"swiglu_kept.tile"}),
    ("fp8_power_of_two", (under_every_rule(*(f"{name}.power_of_two" for name in (*OPERANDS, "kept")))
                          | {"swiglu_kept.power_of_two"})
     - {"sites.0.rule.kept.power_of_two", "sites.1.rule.fprop_x.power_of_two", "sites.1.rule.kept.power_of_two",
        "sites.2.rule.dgrad_dy.power_of_two"}),
])
def test_every_ablation_changes_one_thing(name, paths):
    assert changed(RECIPES[name]) == paths


def test_names():
    assert resolve("bf16") is None and resolve(FP8) is FP8
    with pytest.raises(UserError, match="config.quant is 'fp4'; expected one of bf16, fp8, fp8_per_tensor,"):
        resolve("fp4")


def test_the_first_site_that_matches_wins():
    free = Site(pattern="attn.*", rule=None)
    recipe = replace(FP8, sites=(free, *FP8.sites))
    assert recipe.rule_of("attn.o") is None and recipe.rule_of("mlp.down") == RULE
    assert replace(FP8, sites=(*FP8.sites, free)).rule_of("attn.o") == FP8.sites[0].rule


def test_a_recipe_may_name_every_format_there_is():
    assert list(FORMATS) == list(formats.FORMATS) == [fmt.name for fmt in formats.FORMATS.values()]


def test_a_misspelt_site_is_refused():
    with pytest.raises(UserError, match="'atn.o' matches none of attn.q, "):
        Site(pattern="atn.o", rule=None)


def test_a_recipe_survives_json_and_the_command_line():
    tiny = load_config("configs/tiny.py", ["quant=fp8"])
    assert tiny.recipe is FP8
    for name in RECIPES:
        whole = replace(tiny, quant=resolve(name) or name)
        assert from_dict(type(tiny), json.loads(json.dumps(to_dict(whole)))) == whole
    spelled = replace(tiny, quant=FP8)
    own = override(spelled, {"quant.default.dgrad_dy.format": "e5m2", "quant.sites.1.rule": "none",
                             "quant.sites.2.rule": "none", "quant.swiglu_kept": "none"})
    assert own.recipe.default.dgrad_dy.format == "e5m2" and own.recipe.rule_of("experts.down") is None
    assert override(spelled, {"quant": "bf16"}).recipe is None
    with pytest.raises(UserError, match="config.quant is 'fp9'"):
        override(tiny, {"quant": "fp9"})
    with pytest.raises(UserError, match="config.quant is 'fp8' and has no fields to set; a config file that gives the "
                       "QuantConfig itself has them"):
        override(tiny, {"quant.default.interval": "64"})
    with pytest.raises(UserError, match="config.quant is set both as a whole and field by field; keep one; a config "
                       "file that gives the QuantConfig itself"):
        override(tiny, {"quant": "fp8", "quant.default.interval": "64"})
    assert override(spelled, {"quant.default.interval": "64"}).recipe.default.interval == 64


@pytest.mark.parametrize("change, said", [
    (lambda: replace(RULE.fprop_x, format="e3m4"), "Operand.format is 'e3m4'; expected one of 'e4m3', 'e5m2', 'e5m6'"),
    (lambda: replace(RULE.fprop_x, tile="row"), "Operand.tile is 'row'"),
    (lambda: replace(RULE, interval=48), "rule.interval is 48; expected 32, 64 or a multiple of 128"),
    (lambda: replace(RULE, interval=96), "rule.interval is 96"),
    (lambda: replace(RULE, interval=192), "rule.interval is 192"),
    (lambda: replace(RULE, interval=0), "rule.interval is 0"),
    (lambda: replace(RULE, interval=256), "rule.interval 256 spans scales that change every 128 elements"),
    (lambda: replace(change_operands(change_all(FP8, tile="tensor"), "wgrad_dy", tile="inner").default, interval=512),
     r"change every 128 elements \(rule.wgrad_dy\)"),
    (lambda: replace(RULE, fprop_w=RULE.fprop_x), "rule.fprop_w.tile is 'inner'"),
    (lambda: replace(RULE, accumulator="hopper", dgrad_dy=replace(RULE.dgrad_dy, format="e5m2")),
     "rule.dgrad_dy has another format"),
    (lambda: replace(FP8, sites=(Site(pattern="experts.down", rule=None),)), "one of experts.gate_up and experts.down; "
     ".* give both a rule or neither"),
    (lambda: replace(FP8, sites=(Site(pattern="shared.gate_up", rule=None),)), "one of shared.gate_up and shared.down"),
    (lambda: replace(FP8, sites=(Site(pattern="mlp.gate_up", rule=RULE), Site(pattern="*", rule=None))),
     "one of mlp.gate_up and mlp.down"),
    (lambda: replace(FP8, layers=(Layers(first=3, last=3, sites=(Site(pattern="experts.down", rule=None),)),)),
     "give both a rule or neither"),
    (lambda: Layers(first=3, last=2, sites=()), "first 3 and last 2; expected 0 <= first <= last"),
    (lambda: Layers(first=-1, last=2, sites=()), "first -1"),
])
def test_what_cannot_work_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        change()


def test_layers_that_a_model_does_not_have_are_refused():
    free = Site(pattern="attn.*", rule=None)
    of = lambda last: replace(FP8, layers=(Layers(first=0, last=last, sites=(free,)),))
    tiny = load_config("configs/tiny.py", [])
    n_layers = tiny.model.n_layers + tiny.model.mtp.depth
    named = replace(tiny, quant=of(n_layers - 1))
    assert from_dict(type(tiny), json.loads(json.dumps(to_dict(named)))) == named
    with pytest.raises(UserError, match=f"quant.layers reaches layer {n_layers}; .* have {n_layers}"):
        replace(named, quant=of(n_layers))


def test_later_promotion_where_scales_do_not_change():
    assert replace(change_all(FP8, tile="tensor").default, interval=512).interval == 512
    assert isinstance(QuantConfig(default=RULE, sites=(), layers=(), swiglu_kept=None).default, Rule)
