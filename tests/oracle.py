"""The whole of DeepSeek-V3, forward only, in float64 NumPy: what the JAX model is tested against.

Written from the report (arXiv 2412.19437, sections 2 and 4) and the released configuration alone. It imports nothing of
`dsv3` and reads `config` by attribute, so that no mistake is shared. Obvious before fast: one sequence at a time, loops
over layers, heads, tokens and experts. Axes are suffixes, by the project's legend: B batch, T query position, S cache
position, D width, H heads, N nope, R rope, U value, Q query latent, C key/value latent, F hidden, E experts, K chosen,
V vocabulary, L layers. Matrices are [in, out]: y = x @ w. `params` and `routing` are the model's trees, nested dicts.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Oracle:
    """What `forward` returns. Losses are weighted sums of -log p, undivided; `balance` is without its alpha."""

    logits_BTV: np.ndarray
    mtp_logits: list  # [B, T, V] for each depth
    loss: float
    mtp_losses: list  # one sum for each depth
    balance: float
    load: dict  # {"moe_layers": [L, E], "mtp_0": [E], ...}; "moe_layers" only where there are such layers
    hidden_BTD: np.ndarray  # before the final norm
    topk: list  # [B, T, K] for each MoE layer of the main model, best expert first
    mtp_topk: list  # [B, T, K] for each depth


@dataclass
class Routed:
    """What one MoE layer did with one sequence. The load counts (token, choice) pairs, without padding (segment 0)."""

    topk_TK: np.ndarray
    load_E: np.ndarray
    balance: float


def rms_norm(x, gain, eps):
    """x / sqrt(mean(x^2) + eps) * gain, over the last axis."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * gain


def softmax(x):
    """Over the last axis; entries of -inf get exactly zero."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def best(values, k):
    """Indices of the k largest values, largest first; of equal values the lowest index first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def swiglu_mlp(x, gate_up, down):
    """down( silu(gate x) * up x ), with the gate in the first half of the columns of `gate_up` [D, 2F]."""
    width = gate_up.shape[-1] // 2
    g, u = x @ gate_up[:, :width], x @ gate_up[:, width:]
    return (g / (1.0 + np.exp(-g)) * u) @ down


def rope_frequencies(attention):
    """Radians per position of the R/2 rotated pairs, the factor on cos and sin, the factor on q.k before the softmax.

    Plain: f_j = theta^(-2j/R), amplitude 1, scale (N+R)^-0.5 (V3: 192^-0.5 = 0.0721688). YaRN (section 4.3) divides
    slow frequencies by `factor`, keeps fast ones, and ramps between the two pairs that turn beta_fast and beta_slow
    times over the original context (V3: pairs 10 and 23 of 32); with m(c) = 0.1 c ln(factor) + 1 the amplitude is
    m(mscale) / m(mscale_all_dim) and the scale grows by m(mscale_all_dim)^2 (V3: 0.1352338).
    """
    n, r, theta, yarn = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.rope_theta, attention.yarn
    frequencies, scale = np.array([theta ** (-2.0 * j / r) for j in range(r // 2)]), (n + r) ** -0.5
    if yarn is None:
        return frequencies, 1.0, scale

    def pair_turning(turns):
        return r * math.log(yarn.original_seq_len / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))

    def m(c):
        return 0.1 * c * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), r - 1)
    if low == high:
        high += 0.001
    for j in range(r // 2):
        ramp = min(max((j - low) / (high - low), 0.0), 1.0)
        frequencies[j] = frequencies[j] / yarn.factor * ramp + frequencies[j] * (1.0 - ramp)
    return frequencies, m(yarn.mscale) / m(yarn.mscale_all_dim), scale * m(yarn.mscale_all_dim) ** 2


def rotate_interleaved(x_TR, positions, frequencies, amplitude=1.0):
    """Pair j is the neighbours (x[2j], x[2j+1]), as one complex number: times amplitude * exp(i * position * f_j)."""
    out_TR = np.empty_like(x_TR)
    for t, position in enumerate(positions):
        for j, frequency in enumerate(frequencies):
            z = complex(x_TR[t, 2 * j], x_TR[t, 2 * j + 1])
            z *= amplitude * complex(math.cos(position * frequency), math.sin(position * frequency))
            out_TR[t, 2 * j], out_TR[t, 2 * j + 1] = z.real, z.imag
    return out_TR


def mla_queries(x_TD, w, config, positions):
    """Equations 6 to 9: q_nope_THN and the rotated q_rope_THR of a normed input."""
    a = config.attention
    n, r = a.qk_nope_head_dim, a.qk_rope_head_dim
    if a.q_lora_rank is None:
        q = x_TD @ w["q"]
    else:
        q = rms_norm(x_TD @ w["q_a"], w["q_norm"], a.norm_eps) @ w["q_b"]
    frequencies, amplitude, _ = rope_frequencies(a)
    nope, rope = [], []
    for h in range(a.n_heads):
        head = q[:, h * (n + r):(h + 1) * (n + r)]
        nope.append(head[:, :n])
        rope.append(rotate_interleaved(head[:, n:], positions, frequencies, amplitude))
    return np.stack(nope, axis=1), np.stack(rope, axis=1)


def mla_latents(x_TD, w, config, positions):
    """Equations 1 and 3, all that a cache holds: the normed latent c_kv_SC and the rotated, shared key k_rope_SR."""
    a = config.attention
    kv = x_TD @ w["kv_a"]
    c_kv_SC = rms_norm(kv[:, :a.kv_lora_rank], w["kv_norm"], a.norm_eps)
    frequencies, amplitude, _ = rope_frequencies(a)
    return c_kv_SC, rotate_interleaved(kv[:, a.kv_lora_rank:], positions, frequencies, amplitude)


def key_value_weights(kv_b, attention, head):
    """W_UK [C, N] and W_UV [C, U] of one head, out of kv_b [C, H*(N+U)]."""
    n, u = attention.qk_nope_head_dim, attention.v_head_dim
    both = kv_b[:, head * (n + u):(head + 1) * (n + u)]
    return both[:, :n], both[:, n:]


def mla(x_TD, w, config, allowed_TS):
    """Section 2.1.1, equations 1 to 11, on a normed input: keys and values of each head written out; boolean mask."""
    positions = np.arange(len(x_TD))
    q_nope_THN, q_rope_THR = mla_queries(x_TD, w, config, positions)
    c_kv_SC, k_rope_SR = mla_latents(x_TD, w, config, positions)
    _, _, scale = rope_frequencies(config.attention)
    outputs = []
    for h in range(config.attention.n_heads):
        w_uk, w_uv = key_value_weights(w["kv_b"], config.attention, h)
        q = np.concatenate([q_nope_THN[:, h], q_rope_THR[:, h]], axis=-1)
        k = np.concatenate([c_kv_SC @ w_uk, k_rope_SR], axis=-1)
        scores_TS = np.where(allowed_TS, q @ k.T * scale, -np.inf)
        outputs.append(softmax(scores_TS) @ (c_kv_SC @ w_uv))
    return np.concatenate(outputs, axis=-1) @ w["o"]


def absorbed_attention(q_nope_HN, q_rope_HR, c_kv_SC, k_rope_SR, kv_b, attention):
    """One step of decode against the cache alone: W_UK moves to the query's side, W_UV behind the weighted sum.

    score_s = ((W_UK q_nope) . c_s + q_rope . k_rope_s) * scale;  out_HU = (sum_s p_s c_s) W_UV, still before `o`.
    The query attends to all S entries. Equal to `mla` by associativity: q . (c W_UK) = (W_UK q) . c.
    """
    _, _, scale = rope_frequencies(attention)
    outputs = []
    for h in range(attention.n_heads):
        w_uk, w_uv = key_value_weights(kv_b, attention, h)
        scores = (c_kv_SC @ (w_uk @ q_nope_HN[h]) + k_rope_SR @ q_rope_HR[h]) * scale
        outputs.append((softmax(scores) @ c_kv_SC) @ w_uv)
    return np.stack(outputs)


def gate(x_TD, gate_DE, bias_E, moe_config):
    """Section 2.1.2, equations 13 to 16, node-limited: topk_TK (best first), weights_TK and the unbiased scores_TE.

    The bias chooses and never weighs. A group's score is the sum of its two best biased scores (no bias: its maximum);
    experts of groups not kept are out by -inf, since a biased score may be negative.
    """
    c, logits_TE = moe_config, x_TD @ gate_DE
    scores_TE = {"sigmoid": lambda z: 1.0 / (1.0 + np.exp(-z)), "softmax": softmax}[c.score_func](logits_TE)
    size = c.n_routed_experts // c.n_expert_groups
    topk, weights = [], []
    for scores in scores_TE:
        choice = scores + bias_E if c.selection_bias else scores.copy()
        groups = [sorted(choice[g * size:(g + 1) * size], reverse=True) for g in range(c.n_expert_groups)]
        kept = best([sum(group[:2]) if c.selection_bias else group[0] for group in groups], c.n_limited_groups)
        for e in range(c.n_routed_experts):
            if e // size not in kept:
                choice[e] = -np.inf
        chosen = best(choice, c.n_activated_experts)
        weight = scores[chosen]
        if c.norm_topk_prob:
            weight = weight / np.sum(weight)
        topk.append(chosen)
        weights.append(weight * c.route_scale)
    return np.array(topk), np.array(weights), scores_TE


def balance_loss(scores_TE, segment_ids, n_activated_experts):
    """Equations 17 to 20 for one sequence, without alpha: sum_e f_e P_e over its T valid tokens; 0.0 if it has none.

    f_e = E/(K T) * how many tokens hold e among their K best unbiased scores (all experts, no groups);
    P_e = mean over tokens of s_e / sum_j s_j. Perfectly even scores and choices give 1.
    """
    valid_TE = scores_TE[np.asarray(segment_ids) > 0]
    n_tokens, n_experts = valid_TE.shape
    if n_tokens == 0:
        return 0.0
    f, p = np.zeros(n_experts), np.zeros(n_experts)
    for scores in valid_TE:
        for e in best(scores, n_activated_experts):
            f[e] += n_experts / (n_activated_experts * n_tokens)
        p += scores / np.sum(scores) / n_tokens
    return float(np.sum(f * p))


def moe(x_TD, w, bias_E, moe_config, segment_ids):
    """Equation 12 without its residual, on a normed input: sum_k weight_k * Expert_k(x) + Shared(x), and a `Routed`."""
    topk_TK, weights_TK, scores_TE = gate(x_TD, w["gate"], bias_E, moe_config)
    y_TD, load_E = np.zeros_like(x_TD), np.zeros(moe_config.n_routed_experts, np.int64)
    for t, x in enumerate(x_TD):
        for e, weight in zip(topk_TK[t], weights_TK[t]):
            load_E[e] += segment_ids[t] > 0
            y_TD[t] += weight * swiglu_mlp(x, w["experts_gate_up"][e], w["experts_down"][e])
        if moe_config.n_shared_experts > 0:
            y_TD[t] += swiglu_mlp(x, w["shared_gate_up"], w["shared_down"])
    return y_TD, Routed(topk_TK, load_E, balance_loss(scores_TE, segment_ids, moe_config.n_activated_experts))


def allowed_positions(segment_ids, segment_mask):
    """Causal; with `segment_mask` also within equal ids (fine-tuning packs so, pre-training does not: section 4.1)."""
    def allowed(t, s):
        return s <= t and (not segment_mask or segment_ids[t] == segment_ids[s])

    return np.array([[allowed(t, s) for s in range(len(segment_ids))] for t in range(len(segment_ids))])


def block(x_TD, w, bias_E, config, segment_ids, segment_mask):
    """x + MLA(norm x), then x + FFN(norm x), the FFN being `w["moe"]` or a dense `w["mlp"]` (`Routed` is None then)."""
    normed_TD = rms_norm(x_TD, w["attn"]["norm"], config.norm_eps)
    x_TD = x_TD + mla(normed_TD, w["attn"], config, allowed_positions(segment_ids, segment_mask))
    if "mlp" in w:
        normed_TD = rms_norm(x_TD, w["mlp"]["norm"], config.norm_eps)
        return x_TD + swiglu_mlp(normed_TD, w["mlp"]["gate_up"], w["mlp"]["down"]), None
    normed_TD = rms_norm(x_TD, w["moe"]["norm"], config.norm_eps)
    y_TD, routed = moe(normed_TD, w["moe"], bias_E, config.moe, segment_ids)
    return x_TD + y_TD, routed


def trunk(params, routing, config, tokens, segment_ids, segment_mask):
    """Embedding and main layers on one sequence: hidden_TD before the final norm, and a `Routed` per MoE layer."""
    x_TD, routed = params["embed"][tokens], []
    for layer in range(config.n_dense_layers):
        x_TD, _ = block(x_TD, at_layer(params["dense_layers"], layer), None, config, segment_ids, segment_mask)
    for layer in range(config.n_layers - config.n_dense_layers):
        bias_E = routing["moe_layers"]["moe"]["bias"][layer] if config.moe.selection_bias else None
        x_TD, r = block(x_TD, at_layer(params["moe_layers"], layer), bias_E, config, segment_ids, segment_mask)
        routed.append(r)
    return x_TD, routed


def mtp_module(params, routing, config, depth, h_TD, targets, segment_ids, segment_mask):
    """Section 2.2, equations 21 to 23, for depth k = 1, 2, ...: output_TD before the module's norm, and a `Routed`.

    Position i joins h_i^(k-1) with Emb(t_(i+k)), which is targets[i+k-1]; past the row's end, token 0.
    """
    w = params[f"mtp_{depth - 1}"]
    ahead = [targets[i + depth - 1] if i + depth - 1 < len(targets) else 0 for i in range(len(targets))]
    e_TD = rms_norm(params["embed"][ahead], w["enorm"], config.norm_eps)
    h_TD = rms_norm(h_TD, w["hnorm"], config.norm_eps)
    parts = {"embedding_first": [e_TD, h_TD], "hidden_first": [h_TD, e_TD]}[config.mtp.eh_order]
    bias_E = routing[f"mtp_{depth - 1}"]["block"]["moe"]["bias"] if config.moe.selection_bias else None
    joined_TD = np.concatenate(parts, axis=-1) @ w["eh_proj"]
    return block(joined_TD, w["block"], bias_E, config, segment_ids, segment_mask)


def weighted_loss(logits_TV, targets, weights, segment_ids, depth):
    """Equation 24 as a sum: -sum_i weights[i+k] log p_i[targets[i+k]], k = `depth` (0: the main model), over the i for
    which i and i+k lie in one segment and within the row."""
    total = 0.0
    for i in range(len(targets) - depth):
        if segment_ids[i] == segment_ids[i + depth]:
            z = logits_TV[i] - np.max(logits_TV[i])
            total += weights[i + depth] * (np.log(np.sum(np.exp(z))) - z[targets[i + depth]])
    return float(total)


def forward(params, routing, config, tokens_BT, targets_BT, weights_BT, segment_ids_BT, segment_mask):
    """The model on a batch, sequence by sequence, positions 0 to T-1 in each.

    `targets_BT` are the next tokens and `segment_ids_BT` is 0 on padding. `balance` sums over layers, MTP's included,
    and averages over the sequences that hold a valid token.
    """
    params, routing = to_float64(params), to_float64(routing)
    post_norm = {"post_norm": True, "pre_norm": False}[config.mtp.hidden]
    tokens_BT, targets_BT, segment_ids_BT = map(np.asarray, (tokens_BT, targets_BT, segment_ids_BT))
    weights_BT, rows = np.asarray(weights_BT).astype(np.float64), []
    for tokens, targets, weights, segment_ids in zip(tokens_BT, targets_BT, weights_BT, segment_ids_BT):
        x_TD, main = trunk(params, routing, config, tokens, segment_ids, segment_mask)
        out = normed_TD = x_TD
        gain, logits, losses, mtp = params["norm"], [], [], []
        for depth in range(config.mtp.depth + 1):
            if depth > 0:
                h_TD = normed_TD if post_norm else out
                out, routed = mtp_module(params, routing, config, depth, h_TD, targets, segment_ids, segment_mask)
                mtp.append(routed)
                gain = params[f"mtp_{depth - 1}"]["norm"]
            normed_TD = rms_norm(out, gain, config.norm_eps)
            logits.append(normed_TD @ params["head"])
            losses.append(weighted_loss(logits[-1], targets, weights, segment_ids, depth))
        rows.append((x_TD, logits, losses, main, mtp, np.any(segment_ids > 0)))
    return collect(rows)


def collect(rows):
    """An `Oracle` from a batch's rows: arrays stacked, losses and loads summed, balance averaged over valid rows."""
    hidden, logits, losses, main, mtp, valid = zip(*rows)
    logits = [np.stack(z) for z in zip(*logits)]
    losses = [float(sum(z)) for z in zip(*losses)]
    balances = [sum(r.balance for r in [*main[b], *mtp[b]]) for b in range(len(rows)) if valid[b]]
    main, mtp = list(zip(*main)), list(zip(*mtp))  # by layer, then by row
    load = {f"mtp_{k}": sum(r.load_E for r in layer) for k, layer in enumerate(mtp)}
    load |= {"moe_layers": np.stack([sum(r.load_E for r in layer) for layer in main])} if main else {}
    topk, mtp_topk = ([np.stack([r.topk_TK for r in layer]) for layer in layers] for layers in (main, mtp))
    balance, hidden_BTD = float(np.mean(balances)) if balances else 0.0, np.stack(hidden)
    return Oracle(logits[0], logits[1:], losses[0], losses[1:], balance, load, hidden_BTD, topk, mtp_topk)


def at_layer(tree, layer):
    """One layer of a tree whose leaves are stacked on axis 0."""
    return {k: at_layer(v, layer) if isinstance(v, dict) else v[layer] for k, v in tree.items()}


def to_float64(tree):
    """The same tree with every leaf as float64 NumPy."""
    return {k: to_float64(v) if hasattr(v, "items") else np.asarray(v).astype(np.float64) for k, v in tree.items()}
