"""A job for tests of many processes: counts steps in a file, as a checkpoint would, checks a psum at each, may fail.

python tests/ranks.py DIRECTORY STEPS [raise]. Each rank leaves pid_N and, when told to stop, saved_N.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3.parallel.distributed import barrier, fail_fast, initialise, is_main


def collectives(size):
    """Functions of this rank's number to the sum over ranks, and to all of them in order."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def everywhere(function):
        compiled = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False))

        def call(value):
            local = np.full((size,), value, np.float32)
            x_B = jax.make_array_from_callback((size,), NamedSharding(mesh, P("data")), lambda index: local[index])
            return np.asarray(compiled(x_B).addressable_data(0))
        return call

    return everywhere(lambda x: jax.lax.psum(x, "data")), everywhere(
        lambda x: jax.lax.all_gather(x, "data", tiled=True))


def main(directory, steps, mode):
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    initialise()
    rank, size = jax.process_index(), jax.process_count()
    directory.joinpath(f"pid_{rank}").write_text(str(os.getpid()))
    if is_main():
        time.sleep(0.5)  # prepares data, while the others wait
    barrier("data", 30)
    psum, all_gather = collectives(size)
    count = directory / "count"
    first = int(count.read_text()) if count.exists() else 0
    barrier("restored", 30)
    for step in range(first, steps):
        assert psum((rank + 1) * (step + 1)) == (step + 1) * size * (size + 1) / 2
        assert all_gather(rank).tolist() == list(range(size))
        if psum(bool(stop)) > 0:  # any rank's signal stops all of them at the same step
            directory.joinpath(f"saved_{rank}").write_text(str(step))
            return
        if mode == "raise" and step == 5 and rank == 1:
            raise ValueError("rank 1 fails at step 5")
        with directory.joinpath(f"trace_{rank}").open("a") as file:
            file.write(f"{step} ")
        if is_main():
            fresh = directory / "count.new"
            fresh.write_text(str(step + 1))
            fresh.replace(count)
        time.sleep(0.02)
    print("done", rank, flush=True)


if __name__ == "__main__":
    with fail_fast():
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
