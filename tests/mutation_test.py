"""The suite notices every trap of the report: each is set on purpose in a copy of the project, and a test must fail.

A row is a file, the text to break, what it becomes, and the test that has to notice. A row whose text no longer occurs
fails too: bring it up to date with the code.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    trap: str
    file: str
    before: str
    after: str
    noticed_by: str


MUTATIONS = [
    Mutation("masked groups filled with 0 instead of -inf", "model/gate.py",
             "grouped_TGE, -jnp.inf)", "grouped_TGE, 0.0)",
             "tests/model/gate_test.py::test_excluded_groups_stay_excluded_when_every_biased_score_is_negative"),
    Mutation("gate weights from biased scores", "model/gate.py",
             "jnp.take_along_axis(scores_TE, topk_TK", "jnp.take_along_axis(selection_TE, topk_TK",
             "tests/model/gate_test.py::test_bias_moves_the_selection_but_not_the_weights"),
    Mutation("groups scored by their best expert", "model/gate.py",
             "jax.lax.top_k(grouped_TGE, 2)[0]", "jax.lax.top_k(grouped_TGE, 1)[0]",
             "tests/model/gate_test.py::test_a_group_scores_by_its_two_best_with_a_bias_and_by_its_best_without"),
    Mutation("router in the dtype of the model", "model/gate.py",
             "dot_float32(x_TD, w_DE)", "jnp.dot(x_TD, w_DE.astype(x_TD.dtype)).astype(jnp.float32)",
             "tests/model/gate_test.py::test_the_gate_is_float32_in_a_bfloat16_model"),
    Mutation("balance loss counts padding", "model/gate.py",
             "jnp.sum(normalised_BTE * valid_BT[:, :, None], axis=1)", "jnp.sum(normalised_BTE, axis=1)",
             "tests/model/gate_test.py::test_balance_loss_by_hand"),
    Mutation("load counted twice", "model/feed_forward.py",
             "gate.expert_counts(routes.topk_TK,", "2 * gate.expert_counts(routes.topk_TK,",
             "tests/model/feed_forward_test.py::test_every_row_block_gives_the_loop_over_experts"),
    Mutation("half-split instead of interleaved RoPE", "kernels/rotate.py",
             "even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)",
             "even, odd = jnp.split(x.astype(jnp.float32), 2, axis=-1)",
             "tests/kernels/rotate_test.py::test_pairs_are_interleaved"),
    Mutation("a gradient by the rotated key taken for one by the key", "kernels/attention_cudnn.py",
             "        rotate_back(d_k_rope_BTR, rotation_2BTP))", "        d_k_rope_BTR)",
             "tests/kernels/attention_cudnn_test.py -k operands_and_gradients"),
    Mutation("YaRN's softmax factor not squared", "model/rope.py",
             "yarn.mscale_all_dim) ** 2", "yarn.mscale_all_dim)",
             "tests/model/rope_test.py::test_softmax_scale_of_the_released_models"),
    Mutation("no RMSNorm on the key/value latent", "model/mla.py",
             'self.ops.norm_linear(("attn.kv_b",), c_kv_BTC, kv_norm, (kv_b,), latent_eps)',
             '(self.ops.linear("attn.kv_b", c_kv_BTC, kv_b),)',
             "tests/model/oracle_test.py -k v3-packed"),
    Mutation("the norms of the latents with the model's epsilon", "model/mla.py",
             "eps, latent_eps = self.config.norm_eps, c.norm_eps", "eps = latent_eps = self.config.norm_eps",
             "tests/model/oracle_test.py -k one_group-packed"),
    Mutation("eh_proj halves swapped", "model/mtp.py",
             'if c.mtp.eh_order == "embedding_first"', 'if c.mtp.eh_order == "hidden_first"',
             "tests/model/oracle_test.py -k v3-packed"),
    Mutation("attention masked between documents in pre-training", "model/transformer.py",
             "batch.segment_ids_BT if segment_mask else None", "batch.segment_ids_BT",
             "tests/model/oracle_test.py -k v3-packed"),
    Mutation("routing bias decayed with the weights", "train/step.py",
             "update_routing(state.routing,", "update_routing(jax.tree.map(lambda b: 0.9 * b, state.routing),",
             "tests/train/step_test.py::test_weight_decay_never_touches_the_routing_bias"),
    Mutation("bias update from the last micro-batch alone", "train/step.py",
             "return jax.tree.map(jnp.add, sums, micro_step(batch)), None",
             "new = micro_step(batch); added = jax.tree.map(jnp.add, sums, new); "
             "return (added[0], added[1]._replace(load=new[1].load)), None",
             "tests/train/step_test.py::test_micro_batches_give_the_step_of_the_whole_batch"),
    Mutation("gradients normalised per micro-batch", "train/step.py",
             "(params, routing, batch, knobs, tokens, sequences)\n\n        def acc",
             "(params, routing, batch, knobs, jnp.sum(batch.weights_BT), sequences)\n\n        def acc",
             "tests/train/step_test.py::test_micro_batches_give_the_step_of_the_whole_batch"),
    Mutation("loads of one device returned as if they were all", "train/step.py",
             "jax.tree.map(reduce, grads, specs), jax.lax.psum(losses, meshes.DATA)",
             "jax.tree.map(reduce, grads, specs), losses",
             "tests/parallel/mesh_test.py::"
             "test_gradients_and_losses_of_several_devices_are_those_of_one[2]"),
    Mutation("gradients normalised per device", "train/step.py",
             "jnp.maximum(jax.lax.psum(count, meshes.DATA), 1)", "jnp.maximum(count, 1)",
             "tests/parallel/mesh_test.py::"
             "test_gradients_and_losses_of_several_devices_are_those_of_one[2]"),
    Mutation("a step that is not finite is taken", "train/step.py",
             "partial(jnp.where, finite)", "partial(jnp.where, jnp.bool_(True))",
             "tests/train/bad_numbers_test.py::test_a_bad_step_changes_nothing_but_its_count[loss]"),
    Mutation("MTP losses summed over depths, not averaged", "train/step.py",
             "jnp.sum(mtp_D) / max(len(mtp_D), 1)", "jnp.sum(mtp_D)",
             "tests/train/step_test.py::test_the_objective_is_main_plus_lambda_over_depths_plus_alpha_balance"),
    Mutation("weight gradients of experts in bfloat16", "kernels/grouped_dot.py",
             "preferred_element_type=jnp.float32)\n    d_w_EDF", "preferred_element_type=rows_JD.dtype)\n    d_w_EDF",
             "tests/kernels/dot_test.py::test_an_expert_of_many_bfloat16_blocks_loses_nothing"),
    Mutation("moments rounded before use", "train/optimizer.py",
             "jnp.sqrt(v / second)", "jnp.sqrt(v.astype(dtype).astype(jnp.float32) / second)",
             "tests/train/optimizer_test.py::test_bfloat16_moments_are_rounded_once_and_after_use"),
    Mutation("rows beyond the mean load dropped", "kernels/permute.py",
             "row_of_pair = jnp.zeros(n_pairs", "row_of_sorted = jnp.minimum(row_of_sorted, n_rows // 2); "
             "row_of_pair = jnp.zeros(n_pairs",
             "tests/model/feed_forward_test.py::test_nothing_is_dropped_when_all_tokens_choose_the_same_experts"),
    Mutation("the gate's weight missing from an expert's weight gradient", "kernels/swiglu_quantize.py",
             "d_h, h = d_h * weight_M[:, None], h * weight_M[:, None]", "d_h = d_h * weight_M[:, None]",
             "tests/kernels/scaled_test.py::test_swiglu_backward_against_float64"),
    Mutation("another derivative of SiLU in 8 bits", "kernels/swiglu_quantize.py",
             "sigmoid * (1 + gate * (1 - sigmoid))", "sigmoid * (1 + gate * sigmoid)",
             "tests/model/fp8_differences_test.py::test_a_feed_forward_network"),
    Mutation("the gradient by blocks where it is by tiles", "kernels/quantize.py",
             '"inner": ALONG_ROWS', '"inner": BLOCK',
             "tests/kernels/scaled_test.py -k one_read"),
    Mutation("of a multiprocessor's tiles only the last written", "kernels/scaled_warpgroups_hopper.py",
             "lambda: write(before, finished))", "lambda: None)",
             "tests/kernels/scaled_dot_hopper_test.py::test_one_multiprocessor_writes_the_gradient_of_every_expert"),
    Mutation("gate and up halves of released weights swapped", "interop/layout.py",
             'gate_up), lead=lead)\n        yield entry(f"{name}.up_proj.weight", (width, d), (*path, gate_up), '
             "lead=lead, offset=width)",
             'gate_up), lead=lead, offset=width)\n        yield entry(f"{name}.up_proj.weight", (width, d), '
             "(*path, gate_up), lead=lead)",
             "tests/interop/load_test.py::test_the_transposition_of_every_matrix_is_that_of_the_model"),
    Mutation("a shard's scales taken from the first blocks", "interop/load.py",
             "dequantize_blocks(values, scales, (index[0].start, index[1].start))",
             "dequantize_blocks(values, scales)",
             "tests/interop/load_test.py -k sharded_loading"),
    Mutation("YaRN without mscale scales the softmax", "interop/hf_config.py",
             "(1.0, 0.0) if pair == (None, None)", "(1.0, 1.0) if pair == (None, None)",
             "tests/interop/hf_config_test.py -k yarn_without_mscale"),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project without its runs and environment."""
    target = tmp_path_factory.mktemp("mutated")
    for name in ("dsv3", "experiments", "configs", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.trap.replace(" ", "-"))
def test_the_suite_notices(mutation, copy):
    path = copy / "dsv3" / mutation.file
    source = path.read_text()
    assert source.count(mutation.before) == 1, f"{mutation.file} has changed: update this row"
    path.write_text(source.replace(mutation.before, mutation.after))
    try:
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n0", "--assert=plain",
             *mutation.noticed_by.split()],
            cwd=copy, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": str(copy)})
    finally:
        path.write_text(source)
    assert process.returncode == 1, process.stdout + process.stderr
    assert "1 failed" in process.stdout and "AssertionError" in process.stdout, process.stdout
