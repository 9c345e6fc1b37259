"""A job for tests of checkpoints: two processes save, one of them meets damage or a full disk.

python tests/savers.py DIRECTORY damage | python tests/savers.py DIRECTORY full RANK BYTES [THEN_RAISES].
"""

import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_runs import small_config

from dsv3.config import MeshConfig
from dsv3.parallel.distributed import barrier, fail_fast, initialise, is_main
from dsv3.parallel.mesh import DATA, make_mesh
from dsv3.train.checkpoint import Checkpoint, Checkpoints, Damaged, Description, Progress
from dsv3.train.step import BadSteps, TrainState

MOMENT = "opt_state/ocdbt.process_1/d"  # what process 1 has written: its halves of the moments


def state_at(mesh, step):
    """Weights on every device and a moment that is divided, as ZeRO-1 does; all of it depends on `step`."""
    def place(value, spec):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])
    values = np.random.default_rng(step).standard_normal((1024, 128)).astype(np.float32)
    zero = place(np.int32(0), P())
    return TrainState(place(np.int32(step), P()), {"w": place(values, P())}, {}, {"mu": place(-values, P(DATA))},
                      BadSteps(zero, zero))


def save(checkpoints, mesh, step):
    description = Description(small_config(Path("text")), "a tokenizer", {"tokens.npy": "sha"})
    checkpoints.save(Checkpoint(state_at(mesh, step), None, Progress(tokens=step, rows=step)), description)


def restored(workdir, mesh):
    """The step, after a look at every array."""
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state_at(mesh, 0))
    with Checkpoints(workdir, keep=3) as checkpoints:
        found, _ = checkpoints.restore(like, lambda description: None, ema=False)
    step = found.progress.rows
    for ours, theirs in zip(jax.tree.leaves(found.state), jax.tree.leaves(state_at(mesh, step)), strict=True):
        for one, other in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            assert np.array_equal(one.data, other.data)
    return step


def damage(directory, mesh):
    """One process finds a broken file of its half of a moment, a bad record, or arrays that are not what was saved."""
    with Checkpoints(directory / "saved", keep=3) as checkpoints:
        for step in (1, 2):
            save(checkpoints, mesh, step)
    if is_main():
        for place in ("whole", "moment", "record_0", "record_1", "content_0", "content_1"):
            shutil.copytree(directory / "saved", directory / place)
        largest = max((directory / "moment/checkpoints/2" / MOMENT).iterdir(), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
    barrier("copied", 30)
    for place in ("whole", "moment"):
        print(place, restored(directory / place, mesh), flush=True)
    read, verify = Checkpoints._record, Checkpoints._verify

    def found_by(rank, record):
        if jax.process_index() == rank and record["progress"]["rows"] == 2:
            raise Damaged("this process sees damage")
        return record

    for rank in (0, 1):
        Checkpoints._record = lambda self, step: found_by(rank, read(self, step))
        print("record", rank, restored(directory / f"record_{rank}", mesh), flush=True)
        Checkpoints._record = read
        Checkpoints._verify = lambda self, *rest: (verify(self, *rest), found_by(rank, rest[-1]))
        print("content", rank, restored(directory / f"content_{rank}", mesh), flush=True)
        Checkpoints._verify = verify


def full(directory, mesh, rank, size, then_raises=None):
    """A save of which one process cannot write files beyond `size` bytes, while all go on; then the next one.

    Or, in between, one process raises an error for which the others wait in vain.
    """
    with Checkpoints(directory / "saved", keep=3) as checkpoints:
        save(checkpoints, mesh, 1)
        checkpoints.wait()
        if jax.process_index() == rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        save(checkpoints, mesh, 2)
        time.sleep(1)
        print("steps are done", flush=True)
        if jax.process_index() == then_raises:
            raise ValueError("this process fails")
        if then_raises is not None:
            barrier("next step", 600)
        save(checkpoints, mesh, 3)
    print("all saved", flush=True)


def main(directory, mode, *arguments):
    initialise()
    mesh = make_mesh(MeshConfig(data=2))
    {"damage": damage, "full": full}[mode](Path(directory), mesh, *map(int, arguments))


if __name__ == "__main__":
    with fail_fast():
        main(*sys.argv[1:])
