"""Validation: bits per raw byte of held-out text, with MTP agreement and expert load on the same windows."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3.config import Config
from dsv3.data.prepare import Prepared
from dsv3.data.validation import bits_per_byte, windows
from dsv3.model.batch import Batch
from dsv3.model.transformer import Losses, Transformer
from dsv3.parallel import mesh as meshes
from dsv3.parallel.balance import max_violation, stack_loads


class Validation(NamedTuple):
    """`bits_per_byte` as docs/data.md defines it; MaxVio and load per MoE layer.

    `mtp_agreement` is the share of positions at which an MTP depth guesses the token that the main model will guess,
    and `mtp_chance` that share when the two are compared at unrelated positions.
    """

    bits_per_byte: float
    mtp_agreement: list[float]
    mtp_chance: list[float]
    max_vio: list[float]
    load: list[list[int]]


@lru_cache(maxsize=4)
def make_losses(model: Transformer, mesh: Mesh) -> Callable[[chex.ArrayTree, chex.ArrayTree, Batch], Losses]:
    """A jitted function of (params, routing, batch): the losses of a batch divided over the mesh, summed."""

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P(meshes.DATA)), out_specs=P(), check_vma=False)
    def losses(params, routing, batch):
        return jax.lax.psum(model.apply({"params": params, "routing": routing}, batch), meshes.DATA)

    return jax.jit(losses)


def make_validation(
    model: Transformer, config: Config, prepared: Prepared, mesh: Mesh,
) -> Callable[[chex.ArrayTree, chex.ArrayTree], Validation]:
    """A function of (params, routing) that scores the prepared validation documents, divided over the mesh."""
    documents = [tokens for tokens, _ in prepared.validation_documents]
    n_bytes = sum(size for _, size in prepared.validation_documents)
    evaluate = make_losses(model, mesh)

    def validate(params: chex.ArrayTree, routing: chex.ArrayTree) -> Validation:
        rows = config.train.micro_batch_size * mesh.shape[meshes.DATA]
        batches = windows(documents, config.train.seq_len, config.data.eval_stride, rows)
        losses: list[Losses] = jax.device_get([
            evaluate(params, routing, meshes.place_global(mesh, batch, P(meshes.DATA))) for batch in batches])
        total: Any = jax.tree.map(lambda *parts: np.sum(np.stack(parts), axis=0, dtype=np.float64), *losses)
        load_LE = stack_loads(total.load)
        counted_D = np.maximum(total.mtp_tokens_D, 1)
        return Validation(
            float(bits_per_byte(total.main, n_bytes)),
            (total.agree_D / counted_D).tolist(),
            (total.chance_D / counted_D).tolist(),
            np.asarray(max_violation(load_LE)).tolist(),
            np.asarray(load_LE, np.int64).tolist())

    return validate
