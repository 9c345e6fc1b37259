"""One table of names and layouts: every tensor of a Hugging Face checkpoint, and the part of our arrays that it fills.

Matrices are [out, in] there and [in, out] here; layers and experts are tensors there and stacked axes here; a gated
product has two matrices there and one here, gate half first. RoPE is interleaved in both: nothing is re-ordered.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dsv3.config import ModelConfig, require
from dsv3.quant.blocks import BLOCK, n_blocks

SCALE = "_scale_inv"
Path = tuple[str, ...]


class Entry(NamedTuple):
    """A tensor `name` of `shape` there, transposed or not, is the part `place` of the array at `path` here.

    The first key of `path` is the collection (`params`, `routing`); `place` has one slice an axis. `fp8`: E4M3 with
    scales in the released checkpoints. `copy`: stored a second time (the MTP module's embedding and head).
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    place: tuple[slice, ...]
    transpose: bool
    fp8: bool = False
    copy: bool = False

    @property
    def shape_here(self) -> tuple[int, ...]:
        """The axes of `shape` in our order."""
        return self.shape[::-1] if self.transpose else self.shape


def table(config: ModelConfig) -> list[Entry]:
    """All weights of a model, layer by layer, without the scales of FP8 (`kept_fp8`).

    V3: 91,991 tensors with scales, 684,531,386,000 elements.
    """
    d, v = config.dim, config.vocab_size
    entries = [_whole("model.embed_tokens.weight", (v, d), ("params", "embed"), transpose=False)]
    for layer in range(config.n_layers):
        dense = layer < config.n_dense_layers
        run, index = ("dense_layers", layer) if dense else ("moe_layers", layer - config.n_dense_layers)
        entries += _layer(config, f"model.layers.{layer}.", (run,), (index,), moe=not dense)
    entries += [_whole("model.norm.weight", (d,), ("params", "norm"), transpose=False),
                _whole("lm_head.weight", (v, d), ("params", "head"))]
    for depth in range(config.mtp.depth):
        prefix, here = f"model.layers.{config.n_layers + depth}.", ("params", f"mtp_{depth}")
        entries += [
            _whole(prefix + "embed_tokens.weight", (v, d), ("params", "embed"), transpose=False)._replace(copy=True),
            _whole(prefix + "enorm.weight", (d,), (*here, "enorm"), transpose=False),
            _whole(prefix + "hnorm.weight", (d,), (*here, "hnorm"), transpose=False),
            _whole(prefix + "eh_proj.weight", (d, 2 * d), (*here, "eh_proj")),
            *_layer(config, prefix, (here[1], "block"), (), moe=True),
            _whole(prefix + "shared_head.norm.weight", (d,), (*here, "norm"), transpose=False),
            _whole(prefix + "shared_head.head.weight", (v, d), ("params", "head"))._replace(copy=True)]
    return entries


def kept_fp8(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The table with E4M3 kept as it is: each FP8 matrix becomes two tensors, `values` and `scales` at its path.

    Raises `UserError` where two matrices that are one array here would share a block of scales.
    """
    for entry in entries:
        if not entry.fp8:
            yield entry
            continue
        yield entry._replace(path=(*entry.path, "values"))
        place = []
        for part, size in zip(entry.place[-2:], entry.shape_here, strict=True):
            require(part.start % BLOCK == 0, f"{entry.name} begins in the middle of a block of scales of "
                    f"{'/'.join(entry.path)} (its width is not a multiple of {BLOCK}), so that FP8 cannot be kept; "
                    "import with --dtype=bfloat16 or float32")
            place.append(slice(part.start // BLOCK, part.start // BLOCK + n_blocks(size)))
        yield entry._replace(
            name=entry.name + SCALE, shape=scale_shape(entry), path=(*entry.path, "scales"),
            place=(*entry.place[:-2], *place))


def scale_shape(entry: Entry) -> tuple[int, ...]:
    """Of the scales beside an FP8 matrix: kv_a_proj of 576 x 7168 has 5 x 56."""
    return tuple(map(n_blocks, entry.shape))


def leaf_shapes(entries: Iterable[Entry]) -> dict[Path, tuple[int, ...]]:
    """The arrays that the entries fill, with their shapes."""
    shapes: dict[Path, tuple[int, ...]] = {}
    for entry in entries:
        stops = tuple(part.stop for part in entry.place)
        old = shapes.get(entry.path, stops)
        shapes[entry.path] = tuple(map(max, old, stops))
    return shapes


def leaves(entries: Iterable[Entry]) -> dict[Path, list[Entry]]:
    """The entries that fill each array; copies fill none."""
    found: dict[Path, list[Entry]] = {}
    for entry in entries:
        if not entry.copy:
            found.setdefault(entry.path, []).append(entry)
    return found


def _whole(name: str, shape: tuple[int, ...], path: Path, *, transpose: bool = True) -> Entry:
    here = shape[::-1] if transpose else shape
    return Entry(name, shape, path, tuple(slice(0, size) for size in here), transpose)


def _layer(config: ModelConfig, prefix: str, run: Path, index: tuple[int, ...], *, moe: bool) -> Iterator[Entry]:
    """One transformer layer, which here is `index` of the stacked arrays below `run`."""

    def entry(name, shape, path, *, lead=(), transpose=True, fp8=True, offset=0, collection="params"):
        here = shape[::-1] if transpose else shape
        parts = [slice(0, size) for size in here]
        parts[-1] = slice(offset, offset + here[-1])
        place = (*(slice(i, i + 1) for i in (*index, *lead)), *parts)
        return Entry(prefix + name, shape, (collection, *run, *path), place, transpose, fp8)

    def gain(name, size, path):
        return entry(f"{name}.weight", (size,), path, transpose=False, fp8=False)

    def gated(name, width, path, names, lead=()):
        """gate_proj and up_proj, side by side here, and down_proj."""
        gate_up, down = names
        yield entry(f"{name}.gate_proj.weight", (width, d), (*path, gate_up), lead=lead)
        yield entry(f"{name}.up_proj.weight", (width, d), (*path, gate_up), lead=lead, offset=width)
        yield entry(f"{name}.down_proj.weight", (d, width), (*path, down), lead=lead)

    a, m, d = config.attention, config.moe, config.dim
    q_out = a.n_heads * a.qk_head_dim
    yield gain("input_layernorm", d, ("attn", "norm"))
    if a.q_lora_rank is None:
        yield entry("self_attn.q_proj.weight", (q_out, d), ("attn", "q"))
    else:
        yield entry("self_attn.q_a_proj.weight", (a.q_lora_rank, d), ("attn", "q_a"))
        yield gain("self_attn.q_a_layernorm", a.q_lora_rank, ("attn", "q_norm"))
        yield entry("self_attn.q_b_proj.weight", (q_out, a.q_lora_rank), ("attn", "q_b"))
    yield entry("self_attn.kv_a_proj_with_mqa.weight", (a.kv_lora_rank + a.qk_rope_head_dim, d), ("attn", "kv_a"))
    yield gain("self_attn.kv_a_layernorm", a.kv_lora_rank, ("attn", "kv_norm"))
    yield entry("self_attn.kv_b_proj.weight", (a.n_heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank),
                ("attn", "kv_b"))
    yield entry("self_attn.o_proj.weight", (d, a.n_heads * a.v_head_dim), ("attn", "o"))
    yield gain("post_attention_layernorm", d, ("moe" if moe else "mlp", "norm"))
    if not moe:
        yield from gated("mlp", config.inter_dim, ("mlp",), ("gate_up", "down"))
        return
    yield entry("mlp.gate.weight", (m.n_routed_experts, d), ("moe", "gate"), fp8=False)
    if m.selection_bias:
        yield entry("mlp.gate.e_score_correction_bias", (m.n_routed_experts,), ("moe", "bias"), transpose=False,
                    fp8=False, collection="routing")
    for expert in range(m.n_routed_experts):
        yield from gated(f"mlp.experts.{expert}", m.moe_inter_dim, ("moe",), ("experts_gate_up", "experts_down"),
                         (expert,))
    if m.n_shared_experts > 0:
        yield from gated("mlp.shared_experts", m.n_shared_experts * m.moe_inter_dim, ("moe",),
                         ("shared_gate_up", "shared_down"))
