"""A recipe for training in 8 bits, as data: which tensor of which product gets which format, tile and scale.

The report's own (section 3.3) is `RECIPES["fp8"]`; the others each change one thing. A new format is a row of
`dsv3/quant/formats.py` and its name in `FORMATS`, a new recipe is a `QuantConfig`, and neither is a new code path.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Literal

from dsv3.config.errors import require
from dsv3.config.schema import Node

TILE = 128
"""Elements that share a scale; also how deep the tensor core may sum by itself where scales change."""
TENSOR_CORE_STEP = 32
SITES = (
    "attn.q", "attn.q_a", "attn.q_b", "attn.kv_a", "attn.kv_b", "attn.o", "mlp.gate_up", "mlp.down", "shared.gate_up",
    "shared.down", "experts.gate_up", "experts.down", "mtp.eh_proj")
"""Every Linear of a model that a recipe may reach."""
FORMATS = ("e4m3", "e5m2", "e5m6")
"""The names of `dsv3/quant/formats.py:FORMATS`, as a recipe may give them."""


@dataclass(frozen=True, kw_only=True)
class Operand(Node):
    """How one operand of a product is rounded.

    `tile`: elements that share a scale: `inner` 128 along the product's inner dimension (1 x 128), `block` 128 x 128,
    `tensor` all of them. `power_of_two` rounds scales up to powers of two.
    """

    format: str
    tile: Literal["inner", "block", "tensor"]
    power_of_two: bool

    def validate(self) -> None:
        require(self.format in FORMATS, f"Operand.format is {self.format!r}; expected one of "
                f"{', '.join(map(repr, FORMATS))}")


@dataclass(frozen=True, kw_only=True)
class Rule(Node):
    """The three products of a Linear y = x w: forward (fprop), dx = dy w^T (dgrad) and dw = x^T dy (wgrad).

    `kept` is what the input waits in for its weight gradient, which reads it once more as `wgrad_x`. Equal to
    `fprop_x`, it is that very tensor. None makes the weight gradient's operand straight from the input.

    `interval`: products summed before the sum is promoted to float32. `accumulator` is how the reference sums them:
    `float32`, or bit by bit as Hopper's tensor cores (`dsv3/quant/accumulate.py`), which only E4M3 has a model of.
    The kernels for Hopper's tensor cores have the tensor core's own accumulator, promoted every 128: they carry out
    `float32` at that interval, and refuse the model of it and any other interval, so that such a rule runs in plain jnp
    (`kernels=auto`, with a warning) or raises (`kernels=require`).
    """

    fprop_x: Operand
    fprop_w: Operand
    dgrad_dy: Operand
    dgrad_w: Operand
    wgrad_x: Operand
    wgrad_dy: Operand
    kept: Operand | None
    interval: int
    accumulator: Literal["float32", "hopper"]

    def validate(self) -> None:
        for name in ("fprop_w", "dgrad_w"):
            require(getattr(self, name).tile != "inner", f"rule.{name}.tile is 'inner'; weights have scales by block "
                    "or tensor, so that both directions read the same values")
        require(self.interval > 0 and self.interval % TENSOR_CORE_STEP == 0
                and (TILE % self.interval == 0 or self.interval % TILE == 0),
                f"rule.interval is {self.interval}; expected 32, 64 or a multiple of {TILE}")
        operands = {name: getattr(self, name) for name in OPERANDS}
        changing = [name for name, operand in operands.items() if operand.tile != "tensor"]
        require(self.interval <= TILE or not changing,
                f"rule.interval {self.interval} spans scales that change every {TILE} elements (rule."
                f"{', rule.'.join(changing)}); use {TILE}, or tile 'tensor' for both operands of each product")
        others = [name for name, operand in operands.items() if operand.format != "e4m3"]
        require(self.accumulator == "float32" or not others, "rule.accumulator 'hopper' is a model of sums of e4m3 "
                f"products; rule.{', rule.'.join(others)} has another format")


OPERANDS = tuple(field.name for field in fields(Rule) if field.type is Operand)


@dataclass(frozen=True, kw_only=True)
class Site(Node):
    """The rule of the places (`attn.o`, `experts.*`) that match a shell pattern; None: they stay in the model dtype."""

    pattern: str
    rule: Rule | None

    def validate(self) -> None:
        require(any(fnmatchcase(site, self.pattern) for site in SITES),
                f"quant site pattern {self.pattern!r} matches none of {', '.join(SITES)}")


@dataclass(frozen=True, kw_only=True)
class Layers(Node):
    """Other `sites` for the layers from `first` to `last`, both included; an MTP module follows the model's layers."""

    first: int
    last: int
    sites: tuple[Site, ...]

    def validate(self) -> None:
        require(0 <= self.first <= self.last, f"quant.layers has first {self.first} and last {self.last}; expected "
                "0 <= first <= last")


@dataclass(frozen=True, kw_only=True)
class QuantConfig(Node):
    """`default` for every Linear, but for the first of `sites` that matches its name, after those of its `layers`.

    `swiglu_kept`: what the inputs of SwiGLU wait in for the backward pass, which computes its output again; None keeps
    them in the model dtype. Embedding, head, gate, norms and the attention core are in no recipe (section 3.3.1).

    Both products of a SwiGLU network (`mlp`, `shared`, `experts`) have a rule or none. Raises `UserError` otherwise.
    """

    default: Rule
    sites: tuple[Site, ...]
    layers: tuple[Layers, ...]
    swiglu_kept: Operand | None

    def rule_of(self, site: str) -> Rule | None:
        """In a layer that `layers` does not speak of."""
        return next((entry.rule for entry in self.sites if fnmatchcase(site, entry.pattern)), self.default)

    def of_layer(self, index: int) -> "QuantConfig":
        """The recipe of one layer, the same in all."""
        own = tuple(site for layers in self.layers if layers.first <= index <= layers.last for site in layers.sites)
        return replace(self, sites=own + self.sites, layers=())

    def validate(self) -> None:
        for layers in self.layers:  # what they leave must be right too
            self.of_layer(layers.first)
            self.of_layer(layers.last)
        for network in ("mlp", "shared", "experts"):
            up, down = (self.rule_of(f"{network}.{name}") for name in ("gate_up", "down"))
            require((up is None) == (down is None), f"quant gives a rule to only one of {network}.gate_up and {network}"
                    ".down; they and the SwiGLU between them are one operation, so give both a rule or neither")


def _report() -> QuantConfig:
    """Sections 3.3.2 and 3.3.3. The released files hold `mtp.eh_proj` in bfloat16, the text keeps only embedding, head,
    gate, norms and attention core out of FP8; here the text is followed.
    """
    inner = Operand(format="e4m3", tile="inner", power_of_two=False)
    power = replace(inner, power_of_two=True)
    block = replace(inner, tile="block")
    rule = Rule(fprop_x=inner, fprop_w=block, dgrad_dy=inner, dgrad_w=block, wgrad_x=inner, wgrad_dy=inner, kept=inner,
                interval=TILE, accumulator="float32")
    return QuantConfig(
        default=rule,
        sites=(
            Site(pattern="attn.o", rule=replace(rule, kept=replace(power, format="e5m6"))),
            # What is quantised before it travels to the experts (dispatch, forward and backward).
            Site(pattern="experts.gate_up", rule=replace(rule, fprop_x=power, kept=power)),
            Site(pattern="experts.down", rule=replace(rule, dgrad_dy=power))),
        layers=(),
        swiglu_kept=inner)


def change_rules(recipe: QuantConfig, change: Callable[[Rule], Rule]) -> QuantConfig:
    """`recipe` with every rule replaced by `change(rule)`."""
    changed = lambda sites: tuple(replace(site, rule=site.rule and change(site.rule)) for site in sites)
    layers = tuple(replace(some, sites=changed(some.sites)) for some in recipe.layers)
    return replace(recipe, default=change(recipe.default), sites=changed(recipe.sites), layers=layers)


def change_operands(recipe: QuantConfig, *names: str, **changes) -> QuantConfig:
    """`recipe` with fields of the named operands of every rule changed."""
    return change_rules(recipe, lambda rule: replace(rule, **{
        name: replace(getattr(rule, name), **changes) for name in names if getattr(rule, name) is not None}))


def change_all(recipe: QuantConfig, **changes) -> QuantConfig:
    """`recipe` with fields of all of its operands changed, those that wait for the backward pass among them."""
    kept = recipe.swiglu_kept and replace(recipe.swiglu_kept, **changes)
    return replace(change_operands(recipe, *OPERANDS, "kept", **changes), swiglu_kept=kept)


FP8 = _report()

RECIPES: dict[str, QuantConfig | None] = {
    "bf16": None,
    "fp8": FP8,
    "fp8_per_tensor": change_all(FP8, tile="tensor"),
    "fp8_power_of_two": change_all(FP8, power_of_two=True),
    "fp8_e5m2_gradients": change_operands(FP8, "dgrad_dy", "wgrad_dy", format="e5m2"),
    "fp8_block_gradients": change_operands(FP8, "dgrad_dy", tile="block"),  # diverged (appendix B.2)
    "fp8_without_e5m6": change_rules(FP8, lambda rule: replace(rule, kept=rule.fprop_x)),
    "fp8_direct": change_rules(FP8, lambda rule: replace(rule, kept=None)),
}
"""`bf16` is no recipe: every product in the model's own dtype."""


def resolve(quant: str | QuantConfig) -> QuantConfig | None:
    """The recipe of this name, or the recipe itself. Raises `UserError` for an unknown name."""
    if isinstance(quant, QuantConfig):
        return quant
    require(quant in RECIPES, f"config.quant is {quant!r}; expected one of {', '.join(RECIPES)}, or a QuantConfig")
    return RECIPES[quant]
